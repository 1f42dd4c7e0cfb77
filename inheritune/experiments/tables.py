"""The tables of a comparison: results.csv and table.md. A row is a dict that says how one run ended.

A difference is taken between rows of the same seed, hence of the same data in the same order.
"""

import csv
import io
import math
import os
import statistics

from inheritune.base.files import replacing
from inheritune.experiments.arms import Arm
from inheritune.training.logs import show
from inheritune.training.settings import SCHEDULE

COLUMNS = ("arm", "seed", "val_loss", "curve_loss", "steps", "flops", "params", "settings_hash", "wall_s")
COLUMNS += ("n_layer", "layer_steps", "flops_with_reference", "layer_steps_with_reference")
COLUMNS += ("reached_step", "reached_flops", "reached_layer_steps", "lazy_before", "lazy_after")
FEW = "†"  # marks a standard error of two seeds
NOTES = (
    "Validation loss is in nats per token after the last step, on the same fixed tokens for all arms: mean ± "
    "standard error over seeds. With three seeds, a 95 % interval reaches 4.3 standard errors to each side.",
    f"{FEW} With two seeds, a 95 % interval reaches 12.7 standard errors to each side.",
    "Differences are paired by seed; below zero is better. Each arm is compared with the reference trained "
    "with the same optimizer, and with random init and plain Inheritune trained with the same optimizer for "
    "the same number of steps. Arms that consist of several runs, or are labelled as longer, take more steps "
    "than that. If a baseline was run at several learning rates, we use the one with the most seeds; among "
    "those, the lowest loss.",
    "FLOPs and layer-steps (steps × blocks) count all runs of an arm; FLOPs count a teacher's passes, too. "
    "The columns 'with reference' add the reference's own training where an arm starts or learns from it.",
    "An arm 'reaches the reference' at its first validation at or below the last loss logged for the "
    "first row, whatever the optimizer. Earlier runs of the arm are counted.",
)


def markdown(columns, rows) -> str:
    """A Markdown table of texts, the first column on the left and the others on the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """(mean, standard error) of numbers; the error is None for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def with_error(values: list[float], sign="") -> str:
    """'1.2345 ± 0.0067' of three or more numbers, '1.2345 ± 0.0067†' of two, '1.2345' of one, '–' of none.
    sign="+" writes '+1.2345'."""
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    mark = FEW if len(values) == 2 else ""
    return f"{mean:{sign}.4f}" + (f" ± {error:.4f}{mark}" if error is not None else "")


def average(values: list, form: str) -> str:
    """The mean in the number format `form`, '–' if a value is None or there is none."""
    return "–" if not values or None in values else format(statistics.fmean(values), form)


def paired(rows: list[dict], others: list[dict]) -> list[float]:
    """val_loss of rows minus that of the other arm's row of the same seed, for the seeds that both have."""
    theirs = {r["seed"]: r["val_loss"] for r in others}
    return [r["val_loss"] - theirs[r["seed"]] for r in rows if r["seed"] in theirs]


def mean_of(rows: list[dict], key: str = "val_loss") -> float:
    return statistics.fmean(r[key] for r in rows)


def best_variant(arms: dict, base: str, optimizer=None, steps=None) -> Arm | None:
    """Among the variants of `base` with this optimizer and number of steps, the one to report.

    arms: {Arm: rows}; base: "random"; optimizer, steps: None is the experiment's own. Learning rate and
    schedule may differ. The variant with most seeds wins, as means over different seeds cannot be compared;
    among those, the lowest mean loss. Returns None if there is no such variant.
    """
    found = []
    for arm, rows in arms.items():
        name, asked = arm.base, arm.changes.get("max_iters")  # None: the experiment's usual steps
        if arm.entry.longer_than:  # random_2x is random, trained for longer
            name, asked = arm.entry.longer_than, rows[0]["steps"]
        # arm.changes: {"max_iters": 500, "optimizer": "muon"}; no other change than the optimizer may remain
        others = {k: v for k, v in arm.changes.items() if k not in SCHEDULE | {"max_iters"}}
        if name == base and asked == steps and others == ({"optimizer": optimizer} if optimizer else {}):
            found.append(arm)
    return min(found, key=lambda arm: most_seeds_first(arms[arm]), default=None)


def most_seeds_first(rows: list[dict]) -> tuple:
    """Sort key of an arm's rows: most seeds first, then the lowest mean loss."""
    return -len(rows), mean_of(rows)


def loss_difference(arms: dict, arm: Arm, base: str, usual_steps=False) -> str:
    """An arm's loss minus that of `base`, as text; '' if there is no such arm.

    `base` was trained with the same optimizer for the same number of steps; usual_steps: for the
    experiment's usual number of steps.
    """
    steps = None if usual_steps else arm.changes.get("max_iters")
    other = best_variant(arms, base, arm.changes.get("optimizer"), steps)
    return "" if arm.base == base or other is None else with_error(paired(arms[arm], arms[other]), "+")


def reached(rows: list[dict]) -> str:
    """'950; 2.24e+13; 3,800 (2 of 3 seeds)': the mean step, FLOPs and layer-steps at which an arm's seeds
    first reach the reference's final loss. '–' of a model that was given."""
    if rows[0]["steps"] is None:
        return "–"
    there = [r for r in rows if r["reached_step"] is not None]
    if not there:
        return "never"
    forms = {"reached_step": ",.0f", "reached_flops": ".3g", "reached_layer_steps": ",.0f"}
    some = "" if len(there) == len(rows) else f" ({len(there)} of {len(rows)} seeds)"
    return "; ".join(average([r[key] for r in there], form) for key, form in forms.items()) + some


def comparison_table(arms: dict[Arm, list[dict]], left_out: dict[str, str]) -> str:
    """The text of table.md. arms: {arm: a dict with COLUMNS for each seed}; left_out: {arm: why}."""
    columns = ["arm", "blocks", "parameters", "seeds", "validation loss", "minus reference"]
    columns += ["minus random init", "minus Inheritune"]
    forms = {"steps": ",.0f", "flops": ".3g", "flops_with_reference": ".3g"}
    forms |= {"layer_steps_with_reference": ",.0f"}
    columns += ["steps", "FLOPs", "FLOPs with reference", "layer-steps with reference"]
    columns += ["reaches the reference at step; FLOPs; layer-steps", "lazy layers before → after"]
    lines = []
    for arm, found in arms.items():
        cells = [
            ("– " if arm.changes else "") + arm.label,
            str(found[0]["n_layer"]),
            f"{found[0]['params']:,}",
            str(len(found)),
            with_error([r["val_loss"] for r in found]),
            loss_difference(arms, arm, "reference", usual_steps=True),
            loss_difference(arms, arm, "random"),
            loss_difference(arms, arm, "inheritune"),
            *(average([r[key] for r in found], form) for key, form in forms.items()),
            reached(found),
            " → ".join(average([r[key] for r in found], ".1f") for key in ("lazy_before", "lazy_after")),
        ]
        lines.append(cells)
    few = any(FEW in cell for cells in lines for cell in cells)
    notes = [note for note in NOTES if few or not note.startswith(FEW)]
    notes = [*notes, *(f"Left out: {arm} ({why})." for arm, why in left_out.items())]
    return markdown(columns, lines) + "\n\n" + "\n\n".join(notes) + "\n"


def write_tables(folder: str, arms: dict[Arm, list[dict]], left_out: dict[str, str]) -> str:
    """Write results.csv and table.md (see `comparison_table`) into `folder`; returns the table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in (row for rows in arms.values() for row in rows):
        writer.writerow({k: v if isinstance(v, str) else show(v) for k, v in row.items() if k in COLUMNS})
    table = comparison_table(arms, left_out)
    for name, content in (("results.csv", text.getvalue()), ("table.md", table)):
        with replacing(os.path.join(folder, name), "w") as f:
            f.write(content)
    return table
