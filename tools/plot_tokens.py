"""Plot validation loss over training tokens for every arm of a comparison, and print it as tables.

python tools/plot_tokens.py results/smollm2_cut

It reads what replicate.py leaves in FOLDER/logs, and writes FOLDER/tokens.png. Where the runs also measured a
second text (also_validate), both have a panel and a table.
"""

import glob
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # run from anywhere

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import read_json
from inheritune.experiments.arms import find_arm
from inheritune.experiments.plots import LEVEL, finish_axes, plt, save_figure
from inheritune.experiments.tables import markdown
from inheritune.training.logs import read_rows

TEXTS = {"val_loss": "the validation text", "also_val_loss": "the second text"}
ROOM = 1.5  # nats above the highest last loss that the figure shows


def read_curves(folder: str) -> tuple[dict, dict[str, float]]:
    """({(arm's name, seed): {column of TEXTS: [(tokens, loss)]}}, {column: mean loss of the references}).

    On the second text a reference is measured only where the arm `whole` goes on training it.

    Raises UserError when the folder has no row of a reference.
    """
    curves, levels = {}, {column: [] for column in TEXTS}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "logs", "seed_*", "*", "row.json"))):
        row = read_json(path)
        if row["arm"] == "reference":
            levels["val_loss"].append(row["curve_loss"])
            continue
        own, before = {column: [] for column in TEXTS}, 0
        for log in sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*", "log.csv"))):
            rows = read_rows(log)
            for column, points in own.items():
                points += [(before + int(r["tokens"]), float(r[column])) for r in rows if r.get(column)]
            before += int(rows[-1]["tokens"])  # an arm may consist of several runs
        curves[row["arm"], row["seed"]] = own
        if find_arm(row["arm"]).base == "whole":
            levels["also_val_loss"] += [loss for tokens, loss in own["also_val_loss"] if tokens == 0]
    if not levels["val_loss"] or not curves:
        raise UserError(f"{folder}/logs lacks a reference's row, or any other: run replicate.py first")
    by_last_loss = sorted(curves.items(), key=lambda item: item[1]["val_loss"][-1][1])
    return dict(by_last_loss), {column: statistics.fmean(found) for column, found in levels.items() if found}


def label_of(arm: str, seed: int) -> str:
    """'highest block influence', and from seed 2 on the seed."""
    return find_arm(arm).label + (f", seed {seed}" if seed > 1 else "")


def doublings(curves: dict, column: str) -> list[int]:
    """0, the tokens at the first validation after it, and twice, four, … times as many, where some arm was
    validated."""
    known = {tokens for own in curves.values() for tokens, _ in own[column]}
    first = min(known - {0}, default=1)
    return [tokens for tokens in (0, *(first * 2**i for i in range(40))) if tokens in known]


def plot_curves(path: str, curves: dict, levels: dict[str, float]) -> None:
    """Plot a panel for each text, a line for each arm; the dotted line is the reference's loss.

    The axis of the tokens is linear up to the first validation, and logarithmic from there, so that long
    runs do not push short ones together. All seeds of an arm have one colour, and from seed 2 on dashes.
    """
    texts = [column for column in TEXTS if any(own[column] for own in curves.values())]
    size = 6.5 * len(texts), 5 + 0.22 * len(curves)
    figure, places = plt.subplots(1, len(texts), figsize=size, squeeze=False)
    arms = list(dict.fromkeys(arm for arm, _ in curves))
    colours = plt.get_cmap("tab20").colors
    for axes, column in zip(places.flat, texts, strict=True):
        shown = [(key, own[column]) for key, own in curves.items() if own[column]]
        for key, points in shown:
            style = {"color": colours[arms.index(key[0]) % len(colours)], "marker": "o", "markersize": 3}
            style["linestyle"] = "--" if key[1] > 1 else "-"
            axes.plot(*zip(*points, strict=True), label=f"{label_of(*key)}: {points[-1][1]:.3f}", **style)
        last = [points[-1][1] for _, points in shown]
        if column in levels:
            axes.axhline(levels[column], **LEVEL, label=f"the whole reference: {levels[column]:.3f}")
            last.append(levels[column])
        ticks = doublings(curves, column)  # 0 and more: each text was measured in training
        axes.set_xscale("symlog", linthresh=ticks[1], linscale=0.4)
        axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(left=-ticks[1] / 8)  # a logarithmic axis would leave more room
        axes.set_ylim(min(last) - 0.1, max(last) + ROOM)
        finish_axes(axes, xlabel="training tokens", ylabel="loss (nats/token)", title=f"on {TEXTS[column]}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12))  # below, where it hides no line
    save_figure(figure, path)


def loss_table(curves: dict, column: str) -> str:
    """A Markdown table: a line for each arm, its loss on one text before training, at the first validation,
    and at twice, four, … times as many tokens; '' where none was measured."""
    measured = {key: dict(own[column]) for key, own in curves.items() if own[column]}
    shown = doublings(curves, column)
    lines = [
        [label_of(*key), *(f"{points[tokens]:.3f}" if tokens in points else "" for tokens in shown)]
        for key, points in measured.items()
    ]
    return markdown(["loss after so many tokens", *(f"{tokens:,}" for tokens in shown)], lines)


@one_line
def main(argv=None):
    """Command line: write the figure and print the tables."""
    parser = Parser(description="Plot loss over training tokens for every arm of a comparison.")
    parser.add_argument("folder", help="a folder that replicate.py wrote, such as results/smollm2_cut")
    folder = parser.parse_args(argv).folder
    curves, levels = read_curves(folder)
    path = os.path.join(folder, "tokens.png")
    plot_curves(path, curves, levels)
    for column, text in TEXTS.items():
        if any(own[column] for own in curves.values()):
            print(f"On {text}:\n\n{loss_table(curves, column)}\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
