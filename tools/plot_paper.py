"""Draw the paper's numbers (a CSV file as results/paper.csv) in the style of our figures, beside the file.

python tools/plot_paper.py results/paper.csv
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # run from anywhere

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.experiments.arms import ARMS
from inheritune.experiments.plots import COLOURS, GREY, plot_point_panels
from inheritune.training.logs import read_rows

COLUMNS = ("setting", "arm", "n_layer", "steps", "table", "final", "tail_mean", "tail_sd")
COLUMNS += ("reached_step", "source")


def plot_file(path: str) -> str:
    """Draw a CSV file with COLUMNS beside itself; returns the picture's path."""
    rows = read_rows(path, COLUMNS)
    if not rows:
        raise UserError(f"{path} holds no rows with the columns {', '.join(COLUMNS)}")
    panels = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        points = [point_of(r) for r in rows if r["setting"] == setting]
        logged = any(error is not None for _, _, error, _ in points)
        points.sort(key=lambda p: p[1])
        panels.append((setting, "mean ± sd of the last 10 evaluations" if logged else "as printed", points))
    picture = os.path.splitext(path)[0] + ".png"
    plot_point_panels(picture, panels, "Validation loss in the paper and its released logs")
    return picture


def point_of(row: dict):
    """(label, value, error or None, colour) of a row; the mean of the logs where there are any."""
    label = f"{ARMS[row['arm']].label if row['arm'] in ARMS else row['arm']}, {row['n_layer']} blocks"
    error = float(row["tail_sd"]) if row["tail_sd"] else None
    return label, float(row["tail_mean"] or row["table"]), error, COLOURS.get(row["arm"], GREY)


@one_line
def main(argv=None):
    """Command line: draw the file."""
    parser = Parser(description="Draw the paper's numbers in the style of our figures.")
    parser.add_argument("csv", help="a CSV file as results/paper.csv; its picture lies beside it")
    print(f"written: {plot_file(parser.parse_args(argv).csv)}")


if __name__ == "__main__":
    main()
