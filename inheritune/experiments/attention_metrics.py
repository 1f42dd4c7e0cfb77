"""What attention does in each layer of a model, and what each block is worth (paper, sec. 2).

An attention matrix A (T, T) holds in row i what position i attends to: non-negative, each row sums to 1, zero
above the diagonal. Functions of A take a batch of matrices (…, T, T) and return one number for each, (…), in
float64 on the CPU (Apple GPUs have no float64). `spectrum` alone returns T numbers, in A's dtype.

Some models have no such matrices: those with state-space layers, or with unequal numbers of heads. Then all
that concerns heads is None; block outputs and losses are still measured.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from inheritune.base.errors import UserError
from inheritune.data.reader import Tokens, check_tokenizer
from inheritune.models.blocks import like_output, recorded, replaced
from inheritune.models.open_model import load_model, open_config
from inheritune.training.device import autocast

SEQUENCES, LENGTH, SEED = 100, 100, 1337  # the paper's windows; the seed is ours
NEAR = 1.5  # a head of at most this mean rank counts as near rank 1; the paper uses the word without a number
ELEMENTS = 1 << 22  # of attention matrices in memory at once, at least one window's: tens of MB at length 100
LOGITS = 1 << 26  # logits of one forward pass in skip_losses
REST = 1e-3  # rounding may take this much from a row's sum of 1; a learned sink takes more
TOLERANCE = 1e-6  # relative: a share this close below its threshold has reached it


def open_with_windows(folder: str, data: str, split="val", sequences=SEQUENCES, length=None, seed=SEED):
    """(model, inputs, targets) of a checkpoint folder and windows of a data folder for it.

    length: tokens in a window; None is 100, or the model's context if that is shorter. Raises UserError when
    the data does not fit the model.
    """
    config = open_config(folder)
    check_tokenizer(data, folder, config)
    if length is not None and length > config.block_size:
        raise UserError(f"--length {length} is more than the {config.block_size} tokens that {folder} reads")
    idx, targets = draw_windows(data, split, sequences, length or min(LENGTH, config.block_size), seed)
    return load_model(folder), idx, targets


def draw_windows(folder: str, split: str, sequences: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (sequences, length) int64 from random places of a split. Raises UserError."""
    tokens = Tokens(folder, split)
    places = len(tokens) - length
    if places < sequences:
        raise UserError(
            f"{folder}: {split} has {len(tokens):,} tokens, too few for {sequences} windows of {length}: "
            "take more text, or fewer and shorter windows"
        )
    starts = np.sort(np.random.default_rng(seed).choice(places, size=sequences, replace=False))
    windows = torch.cat([tokens.windows([0], length, first=int(start)) for start in starts]).long()
    return windows[:, :-1], windows[:, 1:]


def analyse(model, idx: Tensor, targets: Tensor, taus, eta: float, skip_sequences: int, dtype) -> dict:
    """Everything, as analysis.json has it; lists run over layers, lists of lists over layers and heads.

    idx, targets: windows (N, T); the loss without a block is taken on the first `skip_sequences` of them
    dtype: what autocast computes these losses in; all else is measured in fp32, because the rank of an
           attention matrix hangs on its small probabilities
    """
    heads, influence, norms = measure_layers(model, idx, taus, eta, title="attention")
    blocks, reason = choose_by_influence(influence.tolist())
    layers = {"block_influence": influence.tolist(), "residual_norm": norms[1:].tolist()}
    found = {
        "sequences": len(idx),
        "length": idx.size(1),
        "suggestion": {"blocks": blocks, "reason": reason},
        "embedding_norm": norms[0].item(),
        "loss": None,
        "loss_sequences": min(skip_sequences, len(idx)),
        "loss_dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
        "heads": None,
    }
    if few := found["loss_sequences"]:
        title = "loss without a block"
        found["loss"], layers["loss_without"] = skip_losses(model, idx[:few], targets[:few], dtype, title)
    if not heads:
        return found

    # measures of the heads, and of a layer by its heads
    max_ranks = {tau: heads[f"rank_{tau:g}"].amax(-1).tolist() for tau in taus}
    near = (heads[f"rank_{taus[0]:g}"] <= NEAR).double()  # (n_layer, n_head)
    layers |= {
        "max_rank": max_ranks[taus[0]],
        **{f"max_rank_{tau:g}": max_ranks[tau] for tau in taus[1:]},
        "lazy": [rank == 1 for rank in max_ranks[taus[0]]],
        "avg_mass": heads["mass"].mean(-1).tolist(),
        "near_rank_one": near.mean(-1).tolist(),
    }
    return found | {
        "taus": list(taus),
        "eta": eta,
        "near_rank_one_means_at_most": NEAR,
        "lazy_layers": sum(layers["lazy"]),
        "near_rank_one_heads": near.mean().item(),
        "groups": groups_of(max_ranks[taus[0]]),
        "learned_sink": heads["rest"].max().item() > REST,
        "heads": {name: values.tolist() for name, values in heads.items() if name != "rest"},
    }


@torch.inference_mode()
def measure_layers(model, idx: Tensor, taus=(0.9,), eta=0.9, title: str | None = None):
    """(heads, influence, norms) of a model on windows idx (N, T).

    heads      {measure: float64 (n_layer, n_head), the mean over windows} (see `measures`), or None; for
               taus=() it is None, and no time is spent on singular values
    influence  (n_layer,): mean over tokens of 1 − cosine of a block's input and output
    norms      (n_layer + 1,): mean length of block 0's input and of each block's output
    A title shows a progress bar. Memory does not grow with N.
    """
    c, (N, T), device = model.config, idx.shape, next(model.parameters()).device
    heads, influence, norms = {}, torch.zeros(c.n_layer).double(), torch.zeros(c.n_layer + 1).double()
    model.eval()
    parts = idx.to(device).split(max(1, ELEMENTS // (c.n_layer * max(1, c.n_head) * T * T)))
    for part in tqdm(parts, desc=title, disable=title is None):
        steps = model.attention_steps(part)
        _, x = next(steps)  # (B, T, C)
        norms[0] += x.norm(dim=-1).cpu().double().sum()
        for i, (A, after) in enumerate(steps):
            for name, values in (measures(A, taus, eta) if taus and A is not None else {}).items():  # (B, nh)
                sums = heads.setdefault(name, torch.zeros(c.n_layer, c.n_head).double())
                sums[i] += values.sum(0)
            before, x = x, after
            influence[i] += (1 - F.cosine_similarity(before, x, dim=-1)).cpu().double().sum()
            norms[i + 1] += x.norm(dim=-1).cpu().double().sum()
    # divided at the end: the sum of whole ranks is exact, and their mean 1 only if all are
    heads = {name: sums / N for name, sums in heads.items()}
    return heads or None, influence / (N * T), norms / (N * T)


@torch.inference_mode()
def skip_losses(
    model, idx: Tensor, targets: Tensor, dtype=torch.float32, title: str | None = None, blocks=None
) -> tuple[float, list[float]]:
    """(loss, losses): mean nats/token of windows idx with targets (N, T), and the same without each block.

    dtype: what autocast computes in; fp32 is no autocast
    blocks: the numbers of those to leave out in turn (default: all)
    """
    T, device = idx.size(1), next(model.parameters()).device
    blocks = list(range(model.config.n_layer)) if blocks is None else blocks
    n = len(blocks)
    model.eval()
    sums = torch.zeros(n + 1).double()  # the last one is the complete model
    rows = max(1, LOGITS // (T * model.config.vocab_size))
    parts = list(zip(idx.to(device).split(rows), targets.to(device).split(rows), strict=True))
    with autocast(device, dtype):
        for part, y in tqdm(parts, desc=title, disable=title is None):
            with recorded(model.blocks) as calls:
                sums[n] += model(part, y).cpu().double() * y.numel()
            for place, i in enumerate(blocks):
                # blocks 0 … i all return what was recorded before block i, so none of them runs
                result = like_output(*calls[i])
                with replaced(model.blocks[: i + 1], lambda *_, result=result, **__: result):
                    sums[place] += model(part, y).cpu().double() * y.numel()
    *skipped, complete = (sums / idx.numel()).tolist()
    return complete, skipped


def choose_by_influence(influence: list[float], k: int | None = None) -> tuple[list[int], str]:
    """(blocks, reason): which k blocks to inherit (default: half), by the block influence of each.

    The paper speaks of such a choice, but takes half of the blocks in any case. Here it is the half
    of highest influence, the measure that best predicts the loss without a block (results/smollm2; ShortGPT,
    arXiv 2403.03853, removes blocks by it). The rank of their attention predicts nothing there.
    """
    n = len(influence)
    order = sorted(range(n), key=lambda i: -influence[i])
    k = k or max(1, n // 2)
    most = max((influence[i] for i in order[k:]), default=0.0)
    reason = f"the {k} of {n} blocks with the highest block influence (the best one left out has {most:.3f})"
    return sorted(order[:k]), reason


def choose_for(folder: str, data: str) -> tuple[list[int], str]:
    """`choose_by_influence` for a checkpoint folder, on the paper's 100 windows of val. Raises UserError."""
    model, idx, _ = open_with_windows(folder, data)
    _, influence, _ = measure_layers(model, idx, taus=())
    return choose_by_influence(influence.tolist())


def groups_of(ranks: list[float], n=3) -> list[dict]:
    """The layers in at most n equal groups: [{first, last, avg_rank, lazy}], lazy: floor(AvgRank) = 1."""
    groups = []
    for part in np.array_split(np.arange(len(ranks)), min(n, len(ranks))):
        average = float(np.mean([ranks[i] for i in part]))
        groups.append(
            {"first": int(part[0]), "last": int(part[-1]), "avg_rank": average, "lazy": average < 2}
        )
    return groups


@torch.inference_mode()
def attention_maps(model, idx: Tensor, chosen: list[tuple[int, int]]) -> dict:
    """{(layer, head): attention matrix (T, T), a NumPy array} of one window idx (T,) for the chosen heads."""
    matrices = [A for A, _ in model.attention_steps(idx[None].to(next(model.parameters()).device))][1:]
    return {(i, h): matrices[i][0, h].cpu().numpy() for i, h in chosen}


def measures(A: Tensor, taus=(0.9,), eta=0.9) -> dict[str, Tensor]:
    """{name: one number per matrix (…)}, of matrices A (…, T, T).

    rank_<tau>          k*(tau), the fewest squared singular values that make up the share tau of their sum
    rank_without_first  the same for taus[0] without column 0: a sink there hides what else a head does
    mass                m*(eta), the fewest columns that hold the share eta of ||A||²
    entropy             the mean of a row's, in nats
    sink                what a row gives to column 0 on average, and to a learned sink if there is one; row 0,
                        which can give to nothing else, is counted
    rest                what a row gives to a learned sink, which is no position
    """
    values = spectrum(A)
    without_first = A.clone()
    without_first[..., 0] = 0
    rest = (1 - A.sum(-1)).cpu().double().mean(-1)
    rest = torch.where(rest > REST, rest, 0.0)
    return {
        **{f"rank_{tau:g}": count_to(values, tau) for tau in taus},
        "rank_without_first": count_to(spectrum(without_first), taus[0]),
        "mass": count_to(A.square().sum(-2), eta),
        "entropy": torch.special.entr(A).sum(-1).cpu().double().mean(-1),
        "sink": A[..., 0].cpu().double().mean(-1) + rest,
        "rest": rest,
    }


def spectrum(A: Tensor) -> Tensor:
    """The squared singular values (…, T) of each matrix, ascending: the eigenvalues of A Aᵀ."""
    gram = A @ A.mT
    if A.is_cuda:  # needs a GPU
        return torch.linalg.eigvalsh(gram)
    gram = gram.cpu()  # Apple GPUs have no eigenvalues
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # LAPACK takes one small matrix after another
        parts = gram.flatten(0, -3).chunk(torch.get_num_threads())
        return torch.cat(list(pool.map(torch.linalg.eigvalsh, parts))).view(A.shape[:-1])


def count_to(values: Tensor, share: float) -> Tensor:
    """How many of the largest `values` (…, n), all ≥ 0, make up `share` of their sum; 0 if the sum is 0."""
    values = values.cpu().double().clamp(min=0).sort(dim=-1, descending=True).values
    total = values.sum(-1, keepdim=True)
    short = values.cumsum(-1) < (share - TOLERANCE) * total  # (…, n): not there yet
    return torch.where(total[..., 0] > 0, short.sum(-1) + 1, 0).double()
