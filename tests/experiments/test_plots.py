"""What the figures are made of, and that they are made. pytest tests/experiments/test_plots.py"""

from inheritune.experiments import plots, tables
from tests.experiments.test_tables import ROWS, rows_of

PNG = b"\x89PNG\r\n\x1a\n"


def named(found):
    """The names of the arms in what plots.py finds."""
    if isinstance(found, dict):
        return {key: named(value) for key, value in found.items()}
    return [arm.name for arm in found] if isinstance(found, list) else found.name


def test_budgets_are_lengths_of_the_same_arm_and_optimizer():
    found = plots.budgets(tables.by_arm([*ROWS, *rows_of("random_2x", [2.1], steps=16)]))
    assert named(found) == {
        ("random", None): {4: "random@max_iters=4", 8: "random", 16: "random_2x"},
        ("ends", None): {4: "ends@max_iters=4", 8: "ends"},
    }


def test_every_figure_is_drawn(tmp_path):
    curves = [([0.0, 1.0, 2.0], [5.0, 3.0, r["val_loss"]]) for r in ROWS]
    curves[0] = ([0.0, 1.0], [5.0, 2.0])  # a seed that stopped early
    names = plots.plot_results(str(tmp_path), ROWS, curves, "adamw")
    assert set(names) == {"curves.png", "compute.png", "rank.png", "budget.png"}
    assert all((tmp_path / name).read_bytes()[:8] == PNG for name in names)


def test_figures_of_a_given_reference_alone(tmp_path):
    rows = [ROWS[0] | {"ranks_before": None}]
    names = plots.plot_results(str(tmp_path), rows, [([], [])], "adamw")
    assert set(names) == {"curves.png", "compute.png", "rank.png"}


def test_the_best_recipe_is_shown_beside_the_usual_ones():
    """Each under its optimizer; an arm that starts from nothing is no recipe, however good."""
    rows = [
        *ROWS,
        *rows_of("kd_inherit", [1.8, 1.9, 2.0]),
        *rows_of("random_2x", [1.0]),
        *rows_of("kd", [1.9, 2.0]),
    ]
    arms = tables.by_arm(rows)
    curves = {arm: [([0.0], [1.0])] for arm in arms}
    assert named(plots.compute_panels(arms, curves)) == {
        None: ["reference", "random", "ends", "kd_inherit"],
        "muon": [
            "reference@optimizer=muon",
            "random@optimizer=muon@learning_rate=4e-3",
            "ends@optimizer=muon",
        ],
    }
