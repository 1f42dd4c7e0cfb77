"""Do the lazy layers cost least when they are skipped? Spearman's rank correlation, over a model's layers, of
each measure with the loss that skipping the block adds.

    python tools/correlate_measures.py results/smollm2/analysis.json

p: the share of random orders of the layers, both sides counted, whose correlation is as far from 0. The inner
layers are all but the first two and the last two, of models with twelve or more.
"""

import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # run from anywhere

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import read_json

ORDERS = 100_000


def columns(found: dict) -> dict[str, np.ndarray]:
    """{measure: one number a layer} of an analysis.json, and the loss added without the block."""
    layers, heads = found["layers"], found["heads"]
    if not heads:
        raise UserError("an analysis without attention matrices has nothing to correlate")
    rank = f"rank_{found['taus'][0]:g}"
    return {
        "added": np.array(layers["loss_without"]) - found["loss"],
        "MaxRank": np.array(layers["max_rank"]),
        "mean rank": np.mean(heads[rank], 1),
        "rank w/o column 0": np.mean(heads["rank_without_first"], 1),
        "AvgMass": np.array(layers["avg_mass"]),
        "entropy": np.mean(heads["entropy"], 1),
        "sink": np.mean(heads["sink"], 1),
        "block influence": np.array(layers["block_influence"]),
        "residual norm": np.array(layers["residual_norm"]),
        "depth": np.arange(len(layers["max_rank"])),
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 on; equal values share the mean of theirs."""
    below, upto = ((values[:, None] > values).sum(1), (values[:, None] >= values).sum(1))
    return (below + upto - 1) / 2


def spearman(x: np.ndarray, y: np.ndarray, seed=1337) -> tuple[float, float]:
    """(rho, p) of two series; p from ORDERS random orders. Series without spread have rho 0 and p 1."""
    x, y = ranks(x) - (len(x) - 1) / 2, ranks(y) - (len(y) - 1) / 2
    scale = np.sqrt((x @ x) * (y @ y))
    if scale == 0:
        return 0.0, 1.0
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(x, (ORDERS, 1)), axis=1) @ y
    as_far = np.abs(shuffled) >= abs(x @ y) - 1e-9
    return float(x @ y / scale), float((as_far.sum() + 1) / (ORDERS + 1))


@one_line
def main(argv=None):
    """Command line: a Markdown table for each analysis."""
    parser = Parser(description=__doc__)
    parser.add_argument("analyses", nargs="+", metavar="analysis.json")
    for path in parser.parse_args(argv).analyses:
        found = read_json(path)
        if found.get("loss") is None:
            raise UserError(f"{path} has no losses without blocks: analyse with --skip_sequences 20 or more")
        measures = columns(found)
        added = measures.pop("added")
        print(f"{path}, {len(added)} layers:\n")
        print("| measure | rho with the loss added | p | rho, inner layers | p |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, values in measures.items():
            rho, p = spearman(values, added)
            inner = "– | –"
            if len(added) >= 12:
                inner = "{:+.2f} | {:.2g}".format(*spearman(values[2:-2], added[2:-2]))
            print(f"| {name} | {rho:+.2f} | {p:.2g} | {inner} |")


if __name__ == "__main__":
    main()
