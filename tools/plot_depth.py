"""Plot what inheriting gives at references of several depths, each with a results.csv of its own.

python tools/plot_depth.py results/depth/4 results/mini results/depth/12 --out results/depth/depth.png
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # run from anywhere

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.experiments.arms import find_arm
from inheritune.experiments.plots import COLOURS, finish_axes, plt, save_figure
from inheritune.training.logs import read_rows

ARMS = ("reference", "random@max_iters=1000", "inheritune@max_iters=1000")  # as in runs/depth.sh
SEED = "1"


def losses(folder: str) -> tuple[int, list[float]]:
    """(blocks of the reference, final validation losses of ARMS) in a comparison's folder."""
    rows = read_rows(os.path.join(folder, "results.csv"))
    found = {row["arm"]: row for row in rows if row.get("seed") == SEED}
    if missing := [arm for arm in ARMS if arm not in found]:
        raise UserError(f"{folder}/results.csv has no row of seed {SEED} of {', '.join(missing)}")
    return int(found["reference"]["n_layer"]), [float(found[arm]["val_loss"]) for arm in ARMS]


@one_line
def main(argv=None):
    """Command line: plot the folders' losses over depth."""
    parser = Parser(description="Plot what inheriting gives at references of several depths.")
    parser.add_argument("folders", nargs="+", help="results of replicate.py, a reference each")
    parser.add_argument("--out", required=True, help="the picture, a PNG file")
    args = parser.parse_args(argv)
    depths, by_depth = zip(*sorted(losses(folder) for folder in args.folders), strict=True)
    figure, axes = plt.subplots(figsize=(6, 4))
    for arm, ys in zip(ARMS, zip(*by_depth, strict=True), strict=True):
        blocks = "all" if arm == "reference" else "half of the"
        label = f"{find_arm(arm).label}, {blocks} blocks"
        axes.plot(depths, ys, "o-", color=COLOURS[find_arm(arm).base], label=label)
    axes.set_xticks(depths)
    finish_axes(axes, xlabel="blocks of the reference", ylabel="final validation loss (nats/token)")
    save_figure(figure, args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
