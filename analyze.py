"""Analyse: which layers of a model are lazy, and what that means for its loss (paper, sec. 2).

    python analyze.py --ckpt out/ --data data/openwebtext --out analysis

For every layer and head: rank, mass, entropy and sink of its attention matrices, averaged over random windows
of the validation split. A layer is lazy when every head has rank 1 on every window (MaxRank = 1). For every
layer: its block influence, the norm of its output, and the loss without the block. A model without attention
matrices gets only these.
"""

import argparse
import os

import numpy as np

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import write_json
from inheritune.experiments import attention_metrics as metrics
from inheritune.experiments.plots import plot_analysis, plot_maps
from inheritune.training import device as machine
from inheritune.weights import checkpoint

MAP_LENGTH = 40  # tokens in maps.png, as in the paper's Fig. 9


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(description="Which layers of a model are lazy, and what its blocks do.")
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder, run folder (its best) or Hugging Face id")
    add("--data", required=True, help="data folder")
    add("--split", default="val", help="the split of --data")
    add("--sequences", type=int, default=metrics.SEQUENCES, help="random windows")
    add("--length", type=int, help="tokens in each (default: 100, or the model's context if shorter)")
    shares = "shares of the squared singular values; the first defines lazy"
    add("--tau", type=share, nargs="+", default=[0.9], help=shares)
    add("--eta", type=share, default=0.9, help="share of the squares, for AvgMass")
    add("--skip_sequences", type=int, default=20, help="windows for the loss without a block; 0: none")
    add("--seed", type=int, default=metrics.SEED, help="of the windows")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=machine.DTYPE_CHOICES, help="of the loss without a block")
    add("--out", required=True, help="folder for analysis.json, rank.png and maps.png")
    return parser


def share(text: str) -> float:
    """The number in a text, above 0 and at most 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return float(text)


def choose_heads(ranks: list[list[float]]) -> list[tuple[int, int]]:
    """[(layer, head)] of highest and of lowest rank at six depths; ranks: lists over layers and heads."""
    depths = np.linspace(0, len(ranks) - 1, 6).round().astype(int).tolist()
    ends = [(i, int(pick(ranks[i]))) for pick in (np.argmax, np.argmin) for i in depths]
    return list(dict.fromkeys(ends))


def table(found: dict) -> str:
    """The analysis as text, a line for each layer."""
    layers, heads = found["layers"], found["heads"]
    columns = {"influence": layers["block_influence"], "norm": layers["residual_norm"]}
    if heads:
        columns |= {"MaxRank": layers["max_rank"], "rank w/o col 0": np.max(heads["rank_without_first"], 1)}
        columns |= {"AvgMass": layers["avg_mass"], "near-1 heads": layers["near_rank_one"]}
        columns |= {"sink": np.mean(heads["sink"], 1), "entropy": np.mean(heads["entropy"], 1)}
    if found["loss"] is not None:
        columns["loss without"] = layers["loss_without"]
    lines = ["layer  " + "  ".join(f"{name:>9}" for name in columns)]
    for i, values in enumerate(zip(*columns.values(), strict=True)):
        cells = [f"{value:{max(9, len(name))}.4f}" for name, value in zip(columns, values, strict=True)]
        lines.append(f"{i:5}  " + "  ".join(cells) + ("  lazy" if heads and layers["lazy"][i] else ""))
    if heads:
        for g in found["groups"]:
            end = ", lazy as a group" if g["lazy"] else ""
            lines.append(f"layers {g['first']} to {g['last']}: AvgRank {g['avg_rank']:.2f}{end}")
        lazy = f"{found['lazy_layers']} of {len(layers['lazy'])} layers are lazy (MaxRank 1"
        near = (
            f"{found['near_rank_one_heads']:.0%} of the heads near rank 1 (mean rank at most {metrics.NEAR})"
        )
        lines.append(f"{lazy} at tau {found['taus'][0]:g}), {near}")
        if found["learned_sink"]:
            lines.append("rows sum to less than 1: the rest goes to learned sinks, and counts as sink")
    else:
        lines.append("this model has no attention matrices to measure")
    if found["loss"] is not None:
        part = f"{found['loss_sequences']} of the windows"
        lines.append(f"loss of the whole model on {part}: {found['loss']:.4f}")
    blocks, reason = found["suggestion"]["blocks"], found["suggestion"]["reason"]
    lines.append(f"to inherit: blocks {', '.join(map(str, blocks))}, {reason}")
    return "\n".join(lines)


@one_line
def main(argv=None):
    """Command line: analyse, print the table, write analysis.json and the two figures."""
    args = make_parser().parse_args(argv)
    for flag in ("sequences", "length"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"{args.out} is a file; --out names a folder")
    folder, device = checkpoint.find(args.ckpt), machine.pick(args.device)

    # analyse
    windows = args.split, args.sequences, args.length, args.seed
    model, idx, targets = metrics.open_with_windows(folder, args.data, *windows)
    model.to(device)
    found = {"checkpoint": args.ckpt, "data": args.data, "split": args.split, "seed": args.seed}
    dtype = machine.pick_dtype(args.dtype, device)
    found |= metrics.analyse(model, idx, targets, args.tau, args.eta, max(0, args.skip_sequences), dtype)

    # write
    os.makedirs(args.out, exist_ok=True)
    files = ["analysis.json"]
    if found["heads"]:
        chosen = choose_heads(found["heads"][f"rank_{args.tau[0]:g}"])
        maps = metrics.attention_maps(model, idx[0, :MAP_LENGTH], chosen)
        plot_analysis(
            os.path.join(args.out, "rank.png"), found, os.path.basename(os.path.normpath(args.ckpt))
        )
        plot_maps(os.path.join(args.out, "maps.png"), maps)
        files += ["rank.png", "maps.png"]
    write_json(os.path.join(args.out, "analysis.json"), found)
    print(table(found))
    print(f"written: {args.out}/{', '.join(files)}")


if __name__ == "__main__":
    main()
