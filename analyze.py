"""Analyse: which layers of a model are lazy, and what that means for its loss (paper, sec. 2).

    python analyze.py --ckpt out/ --data data/openwebtext --out analysis

For every layer and head: rank, mass, entropy and sink of its attention matrices, averaged over random windows
of the validation split. A layer is lazy when every head has rank 1 on every window (MaxRank = 1). For every
layer: how far the block turns the hidden states, how long they are then, and the loss without the block. A
model without attention matrices gets only these.
"""

import os

import numpy as np

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import write_json
from inheritune.experiments.attention_metrics import (
    NEAR,
    SEED,
    SEQUENCES,
    analyse,
    attention_maps,
    open_with_windows,
)
from inheritune.experiments.plots import plot_analysis, plot_maps
from inheritune.models.open_model import open_config
from inheritune.training import device as machine
from inheritune.weights import checkpoint

MAP_LENGTH = 40  # tokens in maps.png, as in the paper's Fig. 9


def make_parser() -> Parser:
    parser = Parser(
        description="Which layers of a model are lazy: ranks of its attention, and what its blocks do."
    )
    parser.add_argument(
        "--ckpt", required=True, help="checkpoint folder, run folder (its best) or Hugging Face id"
    )
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--split", default="val", help="the split of --data")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="random windows")
    parser.add_argument(
        "--length", type=int, help="tokens in each (default: 100, or the model's context if shorter)"
    )
    parser.add_argument(
        "--tau", default="0.9", help="share of the squared singular values; the first of a list counts"
    )
    parser.add_argument("--eta", default="0.9", help="share of the mass in columns")
    parser.add_argument("--groups", type=int, default=3, help="groups of layers, for AvgRank")
    parser.add_argument(
        "--skip_sequences", type=int, default=20, help="windows for the loss without a block; 0: none"
    )
    parser.add_argument(
        "--heads", default="", help="heads in maps.png, e.g. 0.3,11.0 (default: some at six depths)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of the windows")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--out", required=True, help="folder for analysis.json, rank.png and maps.png")
    return parser


def parse_shares(text: str, flag: str) -> tuple[float, ...]:
    """The numbers in a comma-separated list, each above 0 and at most 1. Raises UserError."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < v <= 1 for v in values):
        raise UserError(f"{flag} {text!r}: give shares above 0 and at most 1, such as 0.9")
    return values


def choose_heads(text: str, ranks: list[list[float]]) -> list[tuple[int, int]]:
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
        if not (
            layer.isdecimal() and head.isdecimal() and int(layer) < len(ranks) and int(head) < len(ranks[0])
        ):
            last = f"{len(ranks) - 1}.{len(ranks[0]) - 1}"
            raise UserError(f"--heads: {part!r} is no head; write LAYER.HEAD, from 0.0 to {last}")
        chosen.append((int(layer), int(head)))
    return chosen


def table(found: dict) -> str:
    """The analysis as text, a line for each layer."""
    layers, heads = found["layers"], found["heads"]
    columns = "MaxRank  rank w/o col 0  AvgMass  sink  entropy  near-1 heads  " if heads else ""
    lines = [f"layer  {columns}influence     norm  loss without"]
    for i, influence in enumerate(layers["block_influence"]):
        skipped, lazy, line = "–", "", ""
        if found["loss"] is not None:
            skipped = f"{layers['loss_without'][i]:.4f} ({layers['loss_without'][i] - found['loss']:+.4f})"
        if heads:
            lazy = "   lazy" if layers["lazy"][i] else ""
            line = (
                f"{layers['max_rank'][i]:7.2f}  {max(heads['rank_without_first'][i]):14.2f}  "
                f"{layers['avg_mass'][i]:7.2f}  {np.mean(heads['sink'][i]):4.2f}  "
                f"{np.mean(heads['entropy'][i]):7.3f}  {layers['near_rank_one'][i]:12.0%}  "
            )
        lines.append(f"{i:5}  {line}{influence:9.4f}  {layers['residual_norm'][i]:7.2f}  {skipped}{lazy}")
    lines += heads_in_words(found) if heads else ["this model has no attention matrices to measure"]
    if found["loss"] is not None:
        few = found["loss_sequences"]
        lines.append(f"loss of the whole model on {few} of the windows: {found['loss']:.4f}")
    suggestion = found["suggestion"]
    blocks = ", ".join(map(str, suggestion["blocks"]))
    lines.append(f"inherit.py --layers auto takes blocks {blocks}: {suggestion['reason']}")
    return "\n".join(lines)


def heads_in_words(found: dict) -> list[str]:
    """Lines on groups of layers, lazy layers and learned sinks."""
    lines = []
    for g in found["groups"]:
        lazy = ", lazy as a group" if g["lazy"] else ""
        lines.append(f"layers {g['first']} to {g['last']}: AvgRank {g['avg_rank']:.2f}{lazy}")
    lines.append(
        f"{found['lazy_layers']} of {len(found['layers']['lazy'])} layers are lazy "
        f"(MaxRank 1 at tau {found['taus'][0]:g}), {found['near_rank_one_heads']:.0%} of the heads "
        f"near rank 1 (mean rank at most {NEAR})"
    )
    if found["learned_sink"]:
        lines.append("rows sum to less than 1: the rest goes to learned sinks, and counts as sink")
    return lines


@one_line
def main(argv=None):
    """Command line: analyse, print the table, write analysis.json and the two figures."""
    args = make_parser().parse_args(argv)
    # check all that can be checked before the long work
    taus, (eta,) = parse_shares(args.tau, "--tau"), parse_shares(args.eta, "--eta")[:1]
    for flag in ("sequences", "length", "groups"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"{args.out} is a file; --out names a folder")
    folder = checkpoint.find(args.ckpt)
    config = open_config(folder)
    if config.n_head:
        choose_heads(args.heads, [[0] * config.n_head] * config.n_layer)
    device = machine.pick(args.device)

    # analyse
    model, idx, targets = open_with_windows(
        folder, args.data, args.split, args.sequences, args.length, args.seed
    )
    model.to(device)
    found = {"checkpoint": args.ckpt, "data": args.data, "split": args.split, "seed": args.seed}
    found |= analyse(model, idx, targets, taus, eta, args.groups, max(0, args.skip_sequences))
    maps = {}
    if found["heads"]:
        chosen = choose_heads(args.heads, found["heads"][f"rank_{taus[0]:g}"])
        maps = attention_maps(model, idx[0, :MAP_LENGTH], chosen)

    # write
    os.makedirs(args.out, exist_ok=True)
    files = ["analysis.json"]
    if maps:
        name = os.path.basename(os.path.normpath(args.ckpt))
        plot_analysis(os.path.join(args.out, "rank.png"), found, name)
        plot_maps(os.path.join(args.out, "maps.png"), maps)
        files += ["rank.png", "maps.png"]
    write_json(os.path.join(args.out, "analysis.json"), found)
    print(table(found))
    print(f"written: {args.out}/{', '.join(files)}")


if __name__ == "__main__":
    main()
