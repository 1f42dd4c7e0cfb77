"""What attention does in each layer of a model, and what each block is worth (paper, sec. 2).

An attention matrix A (T, T) holds in row i what position i attends to: non-negative, each row sums to 1, zero
above the diagonal. Functions of A take a batch of matrices (…, T, T) and return one number for each, (…), in
float64 on the CPU (Apple GPUs have no float64); products, eigenvalues and entropies use A's device and dtype.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from inheritune.base.errors import UserError
from inheritune.data.reader import Tokens, check_tokenizer
from inheritune.experiments.any_model import AnyConfig, AnyModel
from inheritune.weights.gpt2_format import is_other
from model import GPT, GPTConfig

SEQUENCES, LENGTH, SEED = 100, 100, 1337  # the paper's windows; the seed is ours
NEAR = 1.5  # a head of at most this mean rank counts as near rank 1; the paper uses the word without a number
ELEMENTS = 1 << 22  # of attention matrices measured at a time: tens of MB, whatever model and length
TOLERANCE = 1e-6  # of the whole: a share that reaches its threshold up to rounding has reached it


def open_with_windows(folder: str, data: str, split="val", sequences=SEQUENCES, length=None, seed=SEED):
    """(model, inputs, targets) of a checkpoint folder and windows of a data folder for it.

    length: tokens in a window; None is 100, or the model's context if that is shorter. Raises UserError when
    the data does not fit the model.
    """
    Config, Model = classes_for(folder)
    config = Config.from_folder(folder)
    check_tokenizer(data, folder, config)
    if length is not None and length > config.block_size:
        raise UserError(f"--length {length} is more than the {config.block_size} tokens that {folder} reads")
    idx, targets = draw_windows(data, split, sequences, length or min(LENGTH, config.block_size), seed)
    return Model.from_pretrained(folder), idx, targets


def classes_for(folder: str) -> tuple[type, type]:
    """The classes of a checkpoint folder's configuration and model: ours, or transformers' in our clothes."""
    if not is_other(folder):
        return GPTConfig, GPT
    return AnyConfig, AnyModel


def draw_windows(folder: str, split: str, sequences: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (sequences, length) int64 from random places of a split. Raises UserError."""
    tokens = Tokens(folder, split)
    places = len(tokens) - length
    if places < sequences:
        raise UserError(
            f"{folder}: {split} has {len(tokens):,} tokens, too few for {sequences} windows of {length}: "
            "lower --sequences or --length, or take --split train"
        )
    starts = np.sort(np.random.default_rng(seed).choice(places, size=sequences, replace=False))
    windows = torch.cat([tokens.windows([0], length, first=int(start)) for start in starts]).long()
    return windows[:, :-1], windows[:, 1:]


def analyse(model, idx: Tensor, targets: Tensor, taus, eta: float, groups: int, skip_sequences: int) -> dict:
    """Everything, as analysis.json has it; lists run over layers, lists of lists over layers and heads.

    model: a GPT, or an any_model.AnyModel; so in the functions below. idx, targets: windows (N, T); the loss
    without a block is taken on the first `skip_sequences` of them.
    """
    heads, influence, norms = look(model, idx, taus, eta, title="attention")
    ranks = heads[f"rank_{taus[0]:g}"]  # (n_layer, n_head)
    max_ranks = ranks.amax(-1).tolist()
    blocks, reason = choose_by_influence(influence.tolist())
    layers = {
        "max_rank": max_ranks,
        **{f"max_rank_{tau:g}": heads[f"rank_{tau:g}"].amax(-1).tolist() for tau in taus[1:]},
        "lazy": [r == 1 for r in max_ranks],
        "avg_mass": heads["mass"].mean(-1).tolist(),
        "near_rank_one": (ranks <= NEAR).cpu().double().mean(-1).tolist(),
        "block_influence": influence.tolist(),
        "residual_norm": norms[1:].tolist(),
    }
    loss, few = None, min(skip_sequences, len(idx))
    if few:
        loss, layers["loss_without"] = skip_losses(
            model, idx[:few], targets[:few], title="loss without a block"
        )
    return {
        "sequences": len(idx),
        "length": idx.size(1),
        "taus": list(taus),
        "eta": eta,
        "near_rank_one_means_at_most": NEAR,
        "lazy_layers": sum(layers["lazy"]),
        "near_rank_one_heads": (ranks <= NEAR).cpu().double().mean().item(),
        "groups": groups_of(max_ranks, groups),
        "suggestion": {"blocks": blocks, "reason": reason},
        "embedding_norm": norms[0].item(),
        "loss": loss,
        "loss_sequences": few,
        "layers": layers,
        "heads": {name: values.tolist() for name, values in heads.items()},
    }


@torch.inference_mode()
def look(model, idx: Tensor, taus=(0.9,), eta=0.9, title: str | None = None):
    """(heads, influence, norms) of a model on windows idx (N, T).

    heads: {measure: float64 (n_layer, n_head), the mean over windows} (see `measures`). influence (n_layer,):
    mean over tokens of 1 − cosine of what enters a block and what leaves it. norms (n_layer + 1,): mean
    length of the residual stream before block 0 and after each block. A title shows a progress bar. Memory
    does not grow with N.
    """
    c, (N, T) = model.config, idx.shape
    heads, influence, norms = {}, torch.zeros(c.n_layer).double(), torch.zeros(c.n_layer + 1).double()
    model.eval()
    held = 1 if isinstance(model, GPT) else c.n_layer  # layers whose matrices are in memory at once
    with tqdm(total=N * c.n_layer, desc=title, unit="map", disable=title is None) as bar:
        for part in idx.split(max(1, ELEMENTS // (held * c.n_head * T * T))):  # (B, T)
            steps = walk(model, part)
            _, x = next(steps)  # (B, T, C)
            norms[0] += x.norm(dim=-1).cpu().double().sum()
            waiting = []  # attention matrices of some layers: few at a time would leave cores idle
            for i, (A, after) in enumerate(steps):
                waiting.append(A)
                if i + 1 == c.n_layer or (len(waiting) + 1) * A.numel() > ELEMENTS:
                    many = torch.stack(waiting) if waiting[1:] else A[None]  # (layers, B, nh, T, T)
                    some = many.flatten(0, 2).split(max(1, ELEMENTS // (T * T)))
                    pieces = [measures(piece, taus, eta) for piece in some]
                    for name in pieces[0]:
                        values = torch.cat([piece[name] for piece in pieces]).view(*many.shape[:3])
                        sums = heads.setdefault(name, torch.zeros(c.n_layer, c.n_head).double())
                        sums[i + 1 - len(many) : i + 1] += values.sum(1) / N
                    waiting = []
                # the residual stream
                before, x = x, after
                influence[i] += (1 - F.cosine_similarity(before, x, dim=-1)).cpu().double().sum()
                norms[i + 1] += x.norm(dim=-1).cpu().double().sum()
                bar.update(len(part))
    return heads, influence / (N * T), norms / (N * T)


def walk(model, idx: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yield (None, embeddings (B, T, C)) of windows idx (B, T), then for each block (its attention matrices
    (B, nh, T, T), the residual stream that leaves it)."""
    idx = idx.to(next(model.parameters()).device)
    if not isinstance(model, GPT):
        yield from model.walk(idx)
        return
    x = model.embed(idx)
    yield None, x
    for block in model.transformer.h:
        A, x = block.attn.probabilities(block.ln_1(x)), block(x)
        yield A, x


@torch.inference_mode()
def skip_losses(model, idx: Tensor, targets: Tensor, title: str | None = None) -> tuple[float, list[float]]:
    """(loss, losses): mean nats/token of windows idx with targets (N, T), and the same without each block."""
    if not isinstance(model, GPT):
        return model.skip_losses(idx, targets, title)
    n_layer, device = model.config.n_layer, model.lm_head.weight.device
    model.eval()
    sums = torch.zeros(n_layer + 1).double()  # the last one is the complete model
    rows = max(1, 1024 // idx.size(1))
    with tqdm(total=len(idx) * (n_layer + 1), desc=title, unit="loss", disable=title is None) as bar:
        for start in range(0, len(idx), rows):
            part, y = (t[start : start + rows].to(device) for t in (idx, targets))
            x = model.embed(part)
            for i in range(n_layer + 1):
                rest = x  # has passed blocks 0 … i − 1; block i is left out
                for block in model.transformer.h[i + 1 :]:
                    rest = block(rest)
                logits = model.lm_head(model.transformer.ln_f(rest))
                sums[i] += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").cpu().double()
                if i < n_layer:
                    x = model.transformer.h[i](x)
                bar.update(len(part))
    *skipped, complete = (sums / idx.numel()).tolist()
    return complete, skipped


def max_rank(model, idx: Tensor, tau=0.9) -> Tensor:
    """MaxRank of every layer (n_layer,), the highest mean rank of its heads, on windows idx (N, T)."""
    return look(model, idx, (tau,))[0][f"rank_{tau:g}"].amax(-1)


def choose_by_influence(influence: list[float]) -> tuple[list[int], str]:
    """(blocks, reason): which half of the blocks to inherit, given how far each turns the residual stream.

    The paper announces such a choice without making it, and starts from half of the blocks. Which half: those
    of highest influence, the measure that best predicts the loss without a block (results/smollm2; ShortGPT,
    arXiv 2403.03853, removes blocks by it). The rank of their attention predicts nothing there.
    """
    n = len(influence)
    kept = sorted(range(n), key=lambda i: -influence[i])[: max(1, n // 2)]
    most = max((influence[i] for i in range(n) if i not in kept), default=0.0)
    reason = f"of {n} blocks those that turn the residual stream most, by more than {most:.3f}"
    return sorted(kept), reason


def choose_for(folder: str, data: str) -> tuple[list[int], str]:
    """`choose_by_influence` for a checkpoint folder, on the paper's 100 windows of val. Raises UserError."""
    model, idx, _ = open_with_windows(folder, data)
    _, influence, _ = look(model, idx)
    return choose_by_influence(influence.tolist())


def groups_of(ranks: list[float], n: int) -> list[dict]:
    """The layers in at most n equal groups: [{first, last, avg_rank, lazy}], lazy: floor(AvgRank) = 1."""
    made = []
    for part in np.array_split(np.arange(len(ranks)), min(n, len(ranks))):
        average = float(np.mean([ranks[i] for i in part]))
        made.append({"first": int(part[0]), "last": int(part[-1]), "avg_rank": average, "lazy": average < 2})
    return made


@torch.inference_mode()
def attention_maps(model, idx: Tensor, chosen: list[tuple[int, int]]) -> dict:
    """{(layer, head): attention matrix (T, T), a NumPy array} of one window idx (T,) for the chosen heads."""
    steps = walk(model, idx[None])
    next(steps)
    return {
        (i, h): A[0, h].cpu().numpy() for i, (A, _) in enumerate(steps) for layer, h in chosen if layer == i
    }


def measures(A: Tensor, taus=(0.9,), eta=0.9) -> dict[str, Tensor]:
    """{name: one number per matrix (…)}: `rank_<tau>` is k*(tau), the fewest squared singular values that
    make up the share tau of their sum; `rank_without_first` the same for taus[0] without column 0; `mass` is
    m*(eta), the fewest columns that hold the share eta of ||A||²; `entropy` the mean of a row's, in nats;
    `sink` what a row gives to column 0 on average (row 0 can give to nothing else and counts)."""
    values = spectrum(A)
    without_first = A.clone()
    without_first[..., 0] = 0  # a sink there hides what else a head does
    return {
        **{f"rank_{tau:g}": count_to(values, tau) for tau in taus},
        "rank_without_first": count_to(spectrum(without_first), taus[0]),
        "mass": count_to(A.square().sum(-2), eta),
        "entropy": torch.special.entr(A).sum(-1).cpu().double().mean(-1),
        "sink": A[..., 0].cpu().double().mean(-1),
    }


def spectrum(A: Tensor) -> Tensor:
    """The squared singular values (…, T) of each matrix, ascending: the eigenvalues of A Aᵀ."""
    gram = A @ A.mT
    if A.device.type == "mps":  # needs a GPU
        gram = gram.cpu()  # no eigenvalues there
    if A.is_cuda:  # needs a GPU
        return torch.linalg.eigvalsh(gram)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # LAPACK takes one small matrix after another
        parts = gram.flatten(0, -3).chunk(torch.get_num_threads())
        return torch.cat(list(pool.map(torch.linalg.eigvalsh, parts))).view(A.shape[:-1])


def count_to(values: Tensor, share: float) -> Tensor:
    """How many of the largest `values` (…, n), all ≥ 0, make up `share` of their sum; 0 of nothing."""
    values = values.cpu().double().clamp(min=0).sort(dim=-1, descending=True).values
    total = values.sum(-1, keepdim=True)
    short = values.cumsum(-1) < (share - TOLERANCE) * total  # (…, n): not there yet
    return torch.where(total[..., 0] > 0, short.sum(-1) + 1, 0).cpu().double()
