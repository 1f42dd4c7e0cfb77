"""Plot how many steps inheriting is worth: how many more random initialisation needs for the same loss.

python tools/plot_head_start.py results/mini

It reads the rows of both arms, at all lengths of training, from FOLDER/results.csv, and writes
FOLDER/head_start.md (a table of all seeds) and head_start.png (the first seed). Between two lengths, the loss
of random initialisation is taken to fall linearly with the logarithm of the steps.
"""

import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # run from anywhere

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import replacing
from inheritune.experiments.arms import ARMS, find_arm
from inheritune.experiments.plots import BLACK, COLOURS, finish_axes, plt, save_figure
from inheritune.experiments.tables import markdown
from inheritune.training.logs import read_rows


def final_losses(folder: str, base: str) -> dict[int, dict[int, float]]:
    """{seed: {steps: final validation loss}} of an arm, and of the arms that only train it for longer; of
    variants, only those where nothing but the number of steps differs."""
    found = {}
    for row in read_rows(os.path.join(folder, "results.csv")):
        arm = find_arm(row["arm"])
        if base in (arm.base, arm.entry.longer_than) and set(arm.changes) <= {"max_iters"}:
            found.setdefault(int(row["seed"]), {})[int(row["steps"])] = float(row["val_loss"])
    return found


def steps_to(loss: float, lengths: dict[int, float]) -> float | None:
    """The steps at which {steps: loss} comes down to `loss`; None if it does not, or begins below."""
    steps = sorted(lengths, reverse=True)  # the longest first, so that the losses rise
    losses = [lengths[n] for n in steps]
    if not losses[0] <= loss <= losses[-1]:
        return None
    return float(np.exp(np.interp(loss, losses, np.log(steps))))


def head_starts(folder: str) -> list[tuple[int, int, float, float, float | None]]:
    """[(seed, steps, loss of random init or nan, loss of Inheritune, steps of random init to that loss)], by
    seed and steps. Raises UserError when the folder has not both arms."""
    random, inherited = final_losses(folder, "random"), final_losses(folder, "inheritune")
    if not random or not inherited:
        raise UserError(f"{folder}/results.csv needs rows of random and of inheritune")
    return [
        (seed, n, random[seed].get(n, np.nan), loss, steps_to(loss, random[seed]))
        for seed in sorted(random.keys() & inherited)
        for n, loss in sorted(inherited[seed].items())
    ]


def plot_seed(path: str, folder: str, found, seed: int) -> None:
    """Plot both arms' final losses of one seed over the steps, an arrow for each head start."""
    figure, axes = plt.subplots(figsize=(8, 5))
    losses = {base: final_losses(folder, base)[seed] for base in ("random", "inheritune")}
    for base, lengths in losses.items():
        points = sorted(lengths.items())
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[base], label=ARMS[base].label)
    for _, n, _, loss, needed in (row for row in found if row[0] == seed and row[-1]):
        axes.annotate("", (needed, loss), (n, loss), arrowprops={"arrowstyle": "->", "color": BLACK})
        above = {"textcoords": "offset points", "xytext": (6, 3), "fontsize": 8}
        axes.annotate(f"{needed - n:,.0f} steps", (n, loss), **above)
    axes.set_xscale("log")
    ticks = sorted(set().union(*losses.values()))
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
    axes.set_xticks([], minor=True)
    xlabel = "steps of the run (each point is a run of its own)"
    finish_axes(axes, xlabel=xlabel, ylabel="final validation loss (nats/token)", title=f"seed {seed}")
    save_figure(figure, path)


def head_start_table(found) -> str:
    """The text of head_start.md."""
    columns = ["seed", "steps", "loss of Inheritune", "minus random init", "minus random init, × steps"]
    lines = []
    for seed, n, random, loss, needed in found:
        gap = loss - random
        more = f"{needed:,.0f}, {needed - n:,.0f} more" if needed else "–"
        lines.append([str(seed), f"{n:,}", f"{loss:.4f}", f"{gap:+.4f}", f"{gap * n:+,.0f}", more])
    table = markdown([*columns, "steps of random init to this loss"], lines)
    note = (
        "Final validation losses in nats per token, each of a run of its own; – marks a loss above or below "
    )
    note += "all runs of random init. Made by tools/plot_head_start.py."
    return f"{table}\n\n{note}\n"


@one_line
def main(argv=None):
    """Command line: write the table of all seeds and the figure of the first one."""
    parser = Parser(description="Plot how many steps inheriting is worth.")
    parser.add_argument("folder", help="a folder that replicate.py wrote, such as results/mini")
    folder = parser.parse_args(argv).folder
    found = head_starts(folder)
    with replacing(os.path.join(folder, "head_start.md"), "w") as f:
        f.write(head_start_table(found))
    plot_seed(os.path.join(folder, "head_start.png"), folder, found, seed=found[0][0])
    print(f"{head_start_table(found)}\nwritten: {folder}/head_start.md, head_start.png")


if __name__ == "__main__":
    main()
