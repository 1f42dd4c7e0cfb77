"""Means, errors, differences, verdicts."""

import numpy as np
import pytest

from inheritune.experiments import tables
from inheritune.experiments.arms import find_arm
from inheritune.experiments.growth_report import verdict


def test_statistics_against_numpy():
    ours = [{"seed": s, "val_loss": v} for s, v in ((1, 2.0), (2, 2.3), (3, 2.1))]
    theirs = [{"seed": s, "val_loss": v} for s, v in ((2, 2.6), (1, 2.2), (4, 9.0))]
    assert tables.paired(ours, theirs) == pytest.approx([-0.2, -0.3])
    values = [2.0, 2.3, 2.1]
    mean, error = tables.mean_and_error(values)
    assert (mean, error) == pytest.approx((np.mean(values), np.std(values, ddof=1) / np.sqrt(3)))
    assert tables.with_error([0.25], "+") == "+0.2500" and tables.with_error([]) == "–"
    assert tables.with_error([1.0, 3.0]) == "2.0000 ± 1.0000†"


def test_the_verdict_says_which_way_it_fell():
    ours, reference = ({"n_layer": n, "params": 10 * n, "val_loss": 2.0} for n in (2, 4))
    said = verdict(ours | {"val_loss": 1.9}, reference)
    assert "2 of its 4 blocks (50% of the parameters) end 0.1000 below its loss: matched." in said
    assert "0.1000 above its loss: not matched" in verdict(ours | {"val_loss": 2.1}, reference)


def rows_of(arm, losses, **more):
    """Rows of an arm, a seed for each loss."""
    base = {"arm": arm, "n_layer": 2, "params": 10, "steps": 8, "flops": 1.0, "layer_steps": 16}
    base |= {"wall_s": 1.0, "flops_with_reference": 2.0, "layer_steps_with_reference": 32}
    base |= dict.fromkeys(("reached_step", "reached_flops", "reached_layer_steps"))
    base |= {"lazy_before": 0, "lazy_after": 1, "ranks_before": [3.0, 2.0], "ranks_after": [2.0, 1.0]}
    base |= {"settings_hash": "", **more}
    return [base | {"seed": s, "val_loss": x, "curve_loss": x} for s, x in enumerate(losses)]


ROWS = [
    *rows_of("reference", [2.0, 2.1]),
    *rows_of("reference@optimizer=muon", [1.8, 1.9]),
    *rows_of("random", [2.5, 2.7]),
    *rows_of("random@learning_rate=9e-3", [2.4]),  # one seed: the easier one
    *rows_of("random@max_iters=4", [3.0], steps=4),
    *rows_of("random@optimizer=muon@learning_rate=8e-3", [2.2, 2.3]),
    *rows_of("random@optimizer=muon@learning_rate=4e-3", [2.0, 2.2]),
    *rows_of("ends", [1.9, 2.2, 2.3]),
    *rows_of("ends@max_iters=4", [2.6], steps=4),
    *rows_of("ends@optimizer=muon", [1.9, 2.0]),
]


def by_arm(rows):
    names = dict.fromkeys(row["arm"] for row in rows)
    return {find_arm(name): [row for row in rows if row["arm"] == name] for name in names}


def difference(arms, name, base, **options):
    return tables.loss_difference(arms, find_arm(name), base, **options)


def test_a_recipe_is_held_against_its_own_optimizer_and_steps():
    arms = by_arm(ROWS)
    assert difference(arms, "ends", "random") == "-0.5500 ± 0.0500†"
    assert difference(arms, "ends@max_iters=4", "random") == "-0.4000"
    # of several learning rates with as many seeds the best
    assert difference(arms, "ends@optimizer=muon", "random") == "-0.1500 ± 0.0500†"
    assert difference(arms, "ends@optimizer=muon", "reference", usual_steps=True) == "+0.1000 ± 0.0000†"
    assert difference(arms, "ends@max_iters=4", "reference", usual_steps=True) == "+0.6000"
    # what was trained for twice the steps is the random init of that many
    longer = by_arm([*ROWS, *rows_of("random_2x", [2.1], steps=16), *rows_of("ends@max_iters=16", [2.0])])
    assert difference(longer, "ends@max_iters=16", "random") == "-0.1000"
    assert difference(longer, "random_2x", "random") == "-0.4000"
    assert difference(arms, "ends", "inheritune") == difference(arms, "random", "random") == ""


def test_the_table_groups_variants_and_explains_few_seeds():
    text = tables.comparison_table(by_arm(ROWS), {"unseen": "seen is 1"})
    labels = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("|")][2:]
    ends = labels.index("| first and last half of k")
    assert labels[ends + 1 : ends + 3] == [f"| – first and last half of k, {x}" for x in ("4 steps", "Muon")]
    assert "With two seeds" in text and "Left out: unseen (seen is 1)." in text
    assert "| 2.1333 ± 0.1202 |" in text  # three seeds are not marked
