"""Compare: the rows of many arms and seeds as results.csv, one table and two figures; and the paper's own numbers.

    python compare.py results/paper.csv        # draws results/paper.png

Differences are paired: both arms of a difference have the same seed, hence the same data in the same order.
"""

import csv
import io
import math
import os
import statistics

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import replacing
from inheritune.experiments.arms import ARMS, find_arm
from inheritune.experiments.plots import plot_comparison, plot_point_panels, plot_ranks
from inheritune.training.logs import read_rows, show

COLUMNS = ("arm", "seed", "val_loss", "curve_loss", "steps", "flops", "params", "settings_hash", "wall_s")
COLUMNS += ("n_layer", "layer_steps", "flops_with_reference", "layer_steps_with_reference")
COLUMNS += ("reached_step", "reached_flops", "reached_layer_steps", "lazy_before", "lazy_after")
COLOURS = {  # of the arms that the question is about; the others are grey
    "reference": "black",
    "inheritune": "tab:red",
    "random": "tab:blue",
    "random_2x": "tab:cyan",
    "random_matched": "tab:green",
    "onto": "tab:orange",
    "kd_inherit": "tab:purple",
}
PAPER = ("setting", "arm", "n_layer", "steps", "table", "final", "tail_mean", "tail_sd", "reached_step", "source")


def mean_and_error(values):
    """(mean, standard error) of a list of numbers; the error is None for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def with_error(values, sign=""):
    """'1.2345 ± 0.0067' of a list of numbers, '1.2345' of one, '–' of none."""
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def average(values, form):
    """The mean as text, '–' when a value is None or there is none."""
    return "–" if not values or None in values else format(statistics.fmean(values), form)


def reached(rows):
    """Where an arm's seeds first reach the reference's final loss, as text."""
    there = [r for r in rows if r["reached_step"] is not None]
    if not there:
        return "never"
    step, layer_steps = (average([r[k] for r in there], ",.0f") for k in ("reached_step", "reached_layer_steps"))
    flops = average([r["reached_flops"] for r in there], ".3g")
    some = "" if len(there) == len(rows) else f" ({len(there)} of {len(rows)} seeds)"
    return f"{step}; {flops}; {layer_steps}{some}"


def by_arm(rows):
    """{arm: its rows}, in the order in which they come."""
    return {arm: [r for r in rows if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in rows)}


def paired(rows, others):
    """val_loss of rows less that of the other arm's row of the same seed, for the seeds that both have."""
    theirs = {r["seed"]: r["val_loss"] for r in others}
    return [r["val_loss"] - theirs[r["seed"]] for r in rows if r["seed"] in theirs]


def table(rows, left_out):
    """The comparison in Markdown. rows: dicts with COLUMNS; left_out: {arm: why}."""
    arms = by_arm(rows)
    lines = [
        "| arm | blocks | parameters | seeds | validation loss | less reference | less random init | steps | FLOPs "
        "| FLOPs with reference | layer-steps with reference | reaches the reference at step; FLOPs; layer-steps "
        "| lazy layers before → after |",
        "|---|" + "---:|" * 12,
    ]
    for arm, found in arms.items():
        cells = [
            find_arm(arm).label,
            str(found[0]["n_layer"]),
            f"{found[0]['params']:,}",
            str(len(found)),
            with_error([r["val_loss"] for r in found]),
            "" if arm == "reference" else with_error(paired(found, arms.get("reference", [])), "+"),
            "" if arm == "random" else with_error(paired(found, arms.get("random", [])), "+"),
            average([r["steps"] for r in found], ",.0f"),
            average([r["flops"] for r in found], ".3g"),
            average([r["flops_with_reference"] for r in found], ".3g"),
            average([r["layer_steps_with_reference"] for r in found], ",.0f"),
            reached(found),
            " → ".join(average([r[key] for r in found], ".1f") for key in ("lazy_before", "lazy_after")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        "'Reaches the reference' is the first validation at or below its final loss, earlier stages counted.",
        "Validation loss: nats/token after the last step, on the same fixed tokens for all; mean ± standard error over "
        "seeds. Differences are paired by seed; below zero is better.",
        "FLOPs and layer-steps (steps × blocks) count all stages of an arm and a teacher's forward passes; those 'with "
        "reference' add the reference's own training where an arm starts or learns from it.",
        *(f"Left out: {arm} ({why})." for arm, why in left_out.items()),
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def mean_curve(curves):
    """(xs, mean ys) of several seeds' curves over the same xs."""
    return curves[0][0], [statistics.fmean(ys) for ys in zip(*(ys for _, ys in curves), strict=True)]


def mean_ranks(lists):
    """MaxRank by depth, averaged over seeds; None where it is not known."""
    return None if None in lists else [statistics.fmean(layer) for layer in zip(*lists, strict=True)]


def write_results(folder, rows, curves, left_out):
    """Write results.csv, table.md, curves.png and rank.png into `folder`; returns the table and where it all is.

    rows: as from replicate.make_row; curves: for each row (FLOPs, losses); left_out: {arm: why}.
    """
    os.makedirs(folder, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else show(v) for k, v in row.items() if k in COLUMNS})
    with replacing(os.path.join(folder, "results.csv"), "w") as f:
        f.write(text.getvalue())
    shown = table(rows, left_out)
    with replacing(os.path.join(folder, "table.md"), "w") as f:
        f.write(shown)
    arms = by_arm(rows)
    lines, points = [], []
    for arm, found in arms.items():
        drawn = [c for r, c in zip(rows, curves, strict=True) if r["arm"] == arm and c[0]]
        label, colour = find_arm(arm).label if arm in COLOURS else None, COLOURS.get(arm, "tab:gray")
        if drawn:
            lines.append((label, colour, *mean_curve(drawn)))
        points.append((find_arm(arm).label, *mean_and_error([r["val_loss"] for r in found]), colour))
    points.sort(key=lambda p: p[1])
    target = statistics.fmean(r["val_loss"] for r in arms["reference"])
    name = os.path.basename(os.path.normpath(folder))
    plot_comparison(os.path.join(folder, "curves.png"), lines, points, target, name)
    panels = [
        (f"{find_arm(arm).label}", *(mean_ranks([r[key] for r in found]) for key in ("ranks_before", "ranks_after")))
        for arm, found in arms.items()
    ]
    plot_ranks(os.path.join(folder, "rank.png"), panels, f"{name}: MaxRank by depth")
    return f"{shown}\nwritten: {folder}/results.csv, table.md, curves.png, rank.png"


def draw_paper(path):
    """Draw a CSV file with the PAPER columns beside itself, in the style of curves.png; returns the picture's path."""
    rows = read_rows(path, PAPER)
    if not rows:
        raise UserError(f"{path} holds no rows with the columns {', '.join(PAPER)}")
    panels = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        points = [
            (
                paper_label(r),
                float(r["tail_mean"] or r["table"]),
                float(r["tail_sd"]) if r["tail_sd"] else None,
                COLOURS.get(r["arm"], "tab:gray"),
            )
            for r in rows
            if r["setting"] == setting
        ]
        logged = any(error is not None for _, _, error, _ in points)
        points.sort(key=lambda p: p[1])
        panels.append((setting, "mean ± sd of the last 10 evaluations" if logged else "as printed", points))
    picture = os.path.splitext(path)[0] + ".png"
    plot_point_panels(picture, panels, "Validation loss in the paper and its released logs")
    return picture


def paper_label(row):
    """How a row of paper.csv is called in the figure."""
    return f"{ARMS[row['arm']].label if row['arm'] in ARMS else row['arm']}, {row['n_layer']} blocks"


@one_line
def main(argv=None):
    """Command line: draw the paper's numbers."""
    parser = Parser(description="Draw the paper's numbers (a CSV file as results/paper.csv) in the style of ours.")
    parser.add_argument("csv", help="the file; its picture lies beside it")
    print(f"written: {draw_paper(parser.parse_args(argv).csv)}")


if __name__ == "__main__":
    main()
