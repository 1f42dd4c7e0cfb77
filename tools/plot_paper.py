"""Plot the paper's numbers (a CSV file as results/paper.csv) in the style of our figures, beside the file.

python tools/plot_paper.py results/paper.csv
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # run from anywhere

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.experiments.arms import ARMS
from inheritune.experiments.plots import COLOURS, GREY, plot_points, plt, save_figure
from inheritune.training.logs import read_rows

COLUMNS = ("setting", "arm", "n_layer", "steps", "table", "final", "tail_mean", "tail_sd")
COLUMNS += ("reached_step", "source")


def plot_file(path: str) -> str:
    """Plot a CSV file with COLUMNS beside itself; returns the picture's path."""
    rows = read_rows(path)
    if not rows or tuple(rows[0]) != COLUMNS:
        raise UserError(f"{path} holds no rows with the columns {', '.join(COLUMNS)}")
    panels = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        points = [point_of(r) for r in rows if r["setting"] == setting]
        logged = any(error is not None for _, _, error, _ in points)
        points.sort(key=lambda p: p[1])
        panels.append((setting, "mean ± sd of the last 10 evaluations" if logged else "as printed", points))
    picture = os.path.splitext(path)[0] + ".png"
    plot_panels(picture, panels, "Validation loss in the paper and its released logs")
    return picture


def plot_panels(path: str, panels, title: str) -> None:
    """Plot panels [(title, xlabel, points)] side by side, three in a row."""
    columns = min(3, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [0.9 + 0.22 * max(len(points) for *_, points in row) for row in rows]
    shape = {"squeeze": False, "height_ratios": heights, "figsize": (6 * columns, 0.4 + sum(heights))}
    figure, axes = plt.subplots(len(rows), columns, **shape)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, (name, xlabel, points) in zip(axes.flat, panels, strict=False):
        plot_points(place, points)
        place.set_title(name)
        place.set_xlabel(xlabel, fontsize=8)
        place.tick_params(axis="x", labelsize=8)
    figure.suptitle(title)
    save_figure(figure, path)


def point_of(row: dict):
    """(label, value, error or None, colour) of a row; the mean of the logs where there are any."""
    label = f"{ARMS[row['arm']].label if row['arm'] in ARMS else row['arm']}, {row['n_layer']} blocks"
    error = float(row["tail_sd"]) if row["tail_sd"] else None
    return label, float(row["tail_mean"] or row["table"]), error, COLOURS.get(row["arm"], GREY)


@one_line
def main(argv=None):
    """Command line: plot the file."""
    parser = Parser(description="Plot the paper's numbers in the style of our figures.")
    parser.add_argument("csv", help="a CSV file as results/paper.csv; its picture lies beside it")
    print(f"written: {plot_file(parser.parse_args(argv).csv)}")


if __name__ == "__main__":
    main()
