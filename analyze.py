"""Analyse: which layers of a model are lazy, and what that means for its loss (paper, sec. 2).

    python analyze.py --ckpt out/ --data data/owt --out results/analysis

For every layer and head: the rank, mass, entropy and sink of its attention matrices (attention.py), averaged over
random windows of the validation split. A layer is lazy when every head has rank 1 on every window (MaxRank = 1).
For every layer: how far the block turns the residual stream, how long that is then, and the loss without the block.
"""

import os

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import write_json
from inheritune.data.reader import Tokens, check_tokenizer
from inheritune.experiments.attention_metrics import measures
from inheritune.experiments.plots import plot_analysis, plot_maps
from inheritune.training import device as machine
from inheritune.weights import checkpoint
from inheritune.weights import gpt2_format as hf

ELEMENTS = 1 << 22  # of attention matrices measured at a time: tens of MB, whatever model and length
SEQUENCES, LENGTH = 100, 100  # the paper's windows
NEAR = 1.5  # a head of at most this mean rank counts as near rank 1; the paper uses the word without a number
MAP_LENGTH = 40  # tokens in maps.png, as in the paper's Fig. 9


def draw_windows(folder, split, sequences, length, seed):
    """Inputs and targets (sequences, length) int64 from random places of a split. Raises UserError if it is shorter."""
    tokens = Tokens(folder, split)
    places = len(tokens) - length
    if places < sequences:
        raise UserError(
            f"{folder}: {split} has {len(tokens):,} tokens, too few for {sequences} windows of {length}: "
            "lower --sequences or --length, or take --split train"
        )
    starts = np.sort(np.random.default_rng(seed).choice(places, size=sequences, replace=False))
    pairs = [tokens.windows([0], length, first=int(start)) for start in starts]
    return tuple(torch.cat(side) for side in zip(*pairs, strict=True))


@torch.inference_mode()
def look(model, idx, taus=(0.9,), eta=0.9, title=None):
    """(heads, influence, norms) of a model on windows idx (N, T).

    heads: {measure: float64 (n_layer, n_head), the mean over windows} (see attention.measures). influence (n_layer,):
    mean over tokens of 1 − cosine of what enters a block and what leaves it. norms (n_layer + 1,): mean length of the
    residual stream before block 0 and behind each block. A title shows a progress bar. Memory does not grow with N.
    """
    c, (N, T) = model.config, idx.shape
    heads, influence, norms = {}, torch.zeros(c.n_layer).double(), torch.zeros(c.n_layer + 1).double()
    model.eval()
    with tqdm(total=N * c.n_layer, desc=title, unit="map", disable=title is None) as bar:
        for part in idx.split(max(1, ELEMENTS // (c.n_head * T * T))):  # (B, T)
            x = model.embed(part.to(model.lm_head.weight.device))
            norms[0] += x.norm(dim=-1).cpu().double().sum()
            for i, block in enumerate(model.transformer.h):
                A = block.attn.probabilities(x, block.ln_1).flatten(0, 1)  # (B nh, T, T)
                pieces = [measures(piece, taus, eta) for piece in A.split(max(1, ELEMENTS // (T * T)))]
                for name in pieces[0]:
                    values = torch.cat([piece[name] for piece in pieces]).view(len(part), c.n_head)
                    heads.setdefault(name, torch.zeros(c.n_layer, c.n_head).double())[i] += values.sum(0) / N
                before, x = x, block(x)
                influence[i] += (1 - F.cosine_similarity(before, x, dim=-1)).cpu().double().sum()
                norms[i + 1] += x.norm(dim=-1).cpu().double().sum()
                bar.update(len(part))
    return heads, influence / (N * T), norms / (N * T)


@torch.inference_mode()
def skip_losses(model, idx, targets, title=None):
    """(loss, losses): mean loss in nats/token of windows idx with targets (N, T), and that without each block."""
    c = model.config
    model.eval()
    sums = torch.zeros(c.n_layer + 1).double()  # the last one is the whole model
    rows = max(1, 1024 // idx.size(1))
    with tqdm(total=len(idx) * (c.n_layer + 1), desc=title, unit="loss", disable=title is None) as bar:
        for start in range(0, len(idx), rows):
            part, y = (t[start : start + rows].to(model.lm_head.weight.device) for t in (idx, targets))
            x = model.embed(part)
            for i in range(c.n_layer + 1):
                rest = x  # what has passed blocks 0 … i − 1; block i is left out
                for block in model.transformer.h[i + 1 :]:
                    rest = block(rest)
                logits = model.lm_head(model.transformer.ln_f(rest))
                sums[i] += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").cpu().double()
                if i < c.n_layer:
                    x = model.transformer.h[i](x)
                bar.update(len(part))
    *skipped, whole = (sums / idx.numel()).tolist()
    return whole, skipped


def max_rank(model, idx, tau=0.9):
    """MaxRank of every layer (n_layer,), the highest mean rank of its heads, on windows idx (N, T)."""
    return look(model, idx, (tau,))[0][f"rank_{tau:g}"].amax(-1)


def choose_layers(ranks):
    """(k, reason): how many blocks to inherit from a model whose layers have these MaxRanks.

    The paper announces such a choice without making it. Our rule: the shortest prefix behind which every layer counts
    as lazy in the paper's sense for groups, floor(MaxRank) = 1; when the last layer does not, half of the blocks.
    """
    n = len(ranks)
    k = max((i + 1 for i, r in enumerate(ranks) if r >= 2), default=1)
    if k < n:
        lazy = sum(r == 1 for r in ranks[k:])
        return k, f"behind block {k - 1} all {n - k} layers have floor(MaxRank) = 1, {lazy} of them exactly 1"
    return max(1, n // 2), f"half of {n} blocks: the last layer is not lazy, its MaxRank is {ranks[-1]:.2f}"


def choose_for(folder, data):
    """`choose_layers` for a checkpoint folder, on the paper's 100 windows of a data folder's val. Raises UserError."""
    model, idx, _ = open_both(folder, data, "val", SEQUENCES, None, 1337)
    return choose_layers(max_rank(model, idx).tolist())


def open_both(folder, data, split, sequences, length, seed):
    """(model, inputs, targets) of a checkpoint folder and windows for it; length None is 100 or the model's context."""
    config = hf.read_config(folder)
    check_tokenizer(data, folder, config)
    if length is not None and length > config.block_size:
        raise UserError(f"--length {length} is more than the {config.block_size} tokens that {folder} reads")
    idx, targets = draw_windows(data, split, sequences, length or min(LENGTH, config.block_size), seed)
    return hf.load_model(folder), idx, targets


def groups_of(ranks, n):
    """The layers in n (or fewer) equal groups: [{first, last, avg_rank, lazy}], lazy being floor(AvgRank) = 1."""
    made = []
    for part in np.array_split(np.arange(len(ranks)), min(n, len(ranks))):
        average = float(np.mean([ranks[i] for i in part]))
        made.append({"first": int(part[0]), "last": int(part[-1]), "avg_rank": average, "lazy": average < 2})
    return made


def analyse(model, idx, targets, taus, eta, groups, skip_sequences):
    """Everything, as analysis.json has it; lists run over layers, lists of lists over layers and heads."""
    heads, influence, norms = look(model, idx, taus, eta, title="attention")
    ranks = heads[f"rank_{taus[0]:g}"]  # (n_layer, n_head)
    max_ranks = ranks.amax(-1).tolist()
    k, reason = choose_layers(max_ranks)
    layers = {
        "max_rank": max_ranks,
        **{f"max_rank_{tau:g}": heads[f"rank_{tau:g}"].amax(-1).tolist() for tau in taus[1:]},
        "lazy": [r == 1 for r in max_ranks],
        "avg_mass": heads["mass"].mean(-1).tolist(),
        "near_rank_one": (ranks <= NEAR).cpu().double().mean(-1).tolist(),
        "block_influence": influence.tolist(),
        "residual_norm": norms[1:].tolist(),
    }
    loss = None
    if skip_sequences:
        few = min(skip_sequences, len(idx))
        loss, layers["loss_without"] = skip_losses(model, idx[:few], targets[:few], title="loss without a block")
    return {
        "sequences": len(idx),
        "length": idx.size(1),
        "taus": list(taus),
        "eta": eta,
        "near_rank_one_means_at_most": NEAR,
        "lazy_layers": sum(layers["lazy"]),
        "near_rank_one_heads": (ranks <= NEAR).cpu().double().mean().item(),
        "groups": groups_of(max_ranks, groups),
        "suggestion": {"layers": k, "reason": reason},
        "embedding_norm": norms[0].item(),
        "loss": loss,
        "loss_sequences": min(skip_sequences, len(idx)),
        "layers": layers,
        "heads": {name: values.tolist() for name, values in heads.items()},
    }


def table(found):
    """The analysis as text, a line for each layer."""
    layers, heads = found["layers"], found["heads"]
    lines = ["layer  MaxRank  rank w/o col 0  AvgMass  sink  entropy  near-1 heads  influence     norm  loss without"]
    for i, rank in enumerate(layers["max_rank"]):
        skipped = "–"
        if found["loss"] is not None:
            skipped = f"{layers['loss_without'][i]:.4f} ({layers['loss_without'][i] - found['loss']:+.4f})"
        lines.append(
            f"{i:5}  {rank:7.2f}  {max(heads['rank_without_first'][i]):14.2f}  {layers['avg_mass'][i]:7.2f}"
            f"  {np.mean(heads['sink'][i]):4.2f}  {np.mean(heads['entropy'][i]):7.3f}"
            f"  {layers['near_rank_one'][i]:12.0%}  {layers['block_influence'][i]:9.4f}"
            f"  {layers['residual_norm'][i]:7.2f}  {skipped}{'   lazy' if layers['lazy'][i] else ''}"
        )
    for g in found["groups"]:
        lazy = ", lazy as a group" if g["lazy"] else ""
        lines.append(f"layers {g['first']} to {g['last']}: AvgRank {g['avg_rank']:.2f}{lazy}")
    lines.append(
        f"{found['lazy_layers']} of {len(layers['lazy'])} layers are lazy (MaxRank 1 at tau {found['taus'][0]:g}), "
        f"{found['near_rank_one_heads']:.0%} of the heads near rank 1 (mean rank at most {NEAR})"
    )
    if found["loss"] is not None:
        lines.append(f"loss of the whole model on {found['loss_sequences']} of the windows: {found['loss']:.4f}")
    lines.append(f"inherit --layers auto would take {found['suggestion']['layers']}: {found['suggestion']['reason']}")
    return "\n".join(lines)


@torch.inference_mode()
def attention_maps(model, idx, chosen):
    """{(layer, head): attention matrix (T, T), a NumPy array} of one window idx (T,) for the chosen heads."""
    x = model.embed(idx[None].to(model.lm_head.weight.device))
    maps = {}
    for i, block in enumerate(model.transformer.h):
        A = block.attn.probabilities(x, block.ln_1)[0]  # (nh, T, T)
        maps.update({(i, h): A[h].cpu().numpy() for layer, h in chosen if layer == i})
        x = block(x)
    return maps


def choose_heads(text, ranks):
    """[(layer, head)] from "0.3,11.0"; from nothing the heads of highest and of lowest rank at six depths.

    ranks: a list of lists over layers and heads. Raises UserError.
    """
    if not text:
        depths = dict.fromkeys(np.linspace(0, len(ranks) - 1, 6).round().astype(int).tolist())
        ends = [(i, int(pick(ranks[i]))) for pick in (np.argmax, np.argmin) for i in depths]
        return list(dict.fromkeys(ends))
    chosen = []
    for part in text.split(","):
        layer, _, head = part.strip().partition(".")
        if not (layer.isdecimal() and head.isdecimal() and int(layer) < len(ranks) and int(head) < len(ranks[0])):
            raise UserError(
                f"--heads: {part!r} is no head; write LAYER.HEAD, from 0.0 to {len(ranks) - 1}.{len(ranks[0]) - 1}"
            )
        chosen.append((int(layer), int(head)))
    return chosen


def shares(text, flag):
    """The numbers in a comma-separated list, each above 0 and at most 1. Raises UserError."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < v <= 1 for v in values):
        raise UserError(f"{flag} {text!r}: give shares above 0 and at most 1, such as 0.9")
    return values


def make_parser():
    """The command line."""
    parser = Parser(description="Which layers of a model are lazy: ranks of its attention, and what its blocks do.")
    parser.add_argument("--ckpt", required=True, help="checkpoint folder, run folder (its best) or Hugging Face id")
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--split", default="val", help="the split of --data")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="random windows")
    parser.add_argument("--length", type=int, help="tokens in each (default: 100, or the model's context if shorter)")
    parser.add_argument("--tau", default="0.9", help="share of the squared singular values; the first of a list counts")
    parser.add_argument("--eta", default="0.9", help="share of the mass in columns")
    parser.add_argument("--groups", type=int, default=3, help="groups of layers, for AvgRank")
    parser.add_argument("--skip_sequences", type=int, default=20, help="windows for the loss without a block; 0: none")
    parser.add_argument("--heads", default="", help="heads in maps.png, e.g. 0.3,11.0 (default: some at six depths)")
    parser.add_argument("--seed", type=int, default=1337, help="of the windows")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--out", required=True, help="folder for analysis.json, rank.png and maps.png")
    return parser


@one_line
def main(argv=None):
    """Command line: analyse, print the table, write analysis.json and the two figures."""
    args = make_parser().parse_args(argv)
    taus, (eta,) = shares(args.tau, "--tau"), shares(args.eta, "--eta")[:1]
    for flag in ("sequences", "length", "groups"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"{args.out} is a file; --out names a folder")
    folder = checkpoint.find(args.ckpt)
    config = hf.read_config(folder)
    choose_heads(args.heads, [[0] * config.n_head] * config.n_layer)  # before the long work
    device = machine.pick(args.device)
    model, idx, targets = open_both(folder, args.data, args.split, args.sequences, args.length, args.seed)
    model.to(device)
    found = {"checkpoint": args.ckpt, "data": args.data, "split": args.split, "seed": args.seed}
    found |= analyse(model, idx, targets, taus, eta, args.groups, max(0, args.skip_sequences))
    chosen = choose_heads(args.heads, found["heads"][f"rank_{taus[0]:g}"])
    maps = attention_maps(model, idx[0, :MAP_LENGTH], chosen)
    os.makedirs(args.out, exist_ok=True)
    plot_analysis(os.path.join(args.out, "rank.png"), found, os.path.basename(os.path.normpath(args.ckpt)))
    plot_maps(os.path.join(args.out, "maps.png"), maps)
    write_json(os.path.join(args.out, "analysis.json"), found)
    print(table(found))
    print(f"written: {args.out}/analysis.json, rank.png, maps.png")


if __name__ == "__main__":
    main()
