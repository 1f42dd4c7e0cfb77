"""What the figures are made of, and that they are made."""

from inheritune.experiments import plots
from inheritune.experiments.arms import find_arm
from tests.experiments.test_tables import ROWS, by_arm, rows_of


def test_every_figure_is_drawn(tmp_path):
    arms = by_arm(ROWS)
    curves = {arm: [([0.0, 1.0, 2.0], [5.0, 3.0, r["val_loss"]]) for r in rows] for arm, rows in arms.items()}
    curves[find_arm("ends")][0] = ([0.0, 1.0], [5.0, 2.0])  # a seed that stopped early
    curves[find_arm("reference@optimizer=muon")] = []  # a reference that was given
    plots.plot_comparison(str(tmp_path / "curves.png"), arms, curves, "a title")
    plots.plot_compute(str(tmp_path / "compute.png"), arms, curves, "a title", "adamw")
    names = ("curves.png", "compute.png")
    assert all((tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in names)


def test_the_best_recipe_is_shown_beside_the_usual_ones():
    """Each under its optimizer; an arm that starts from nothing is no recipe, however good."""
    rows = [*ROWS, *rows_of("kd_inherit", [1.8, 1.9, 2.0]), *rows_of("random_2x", [1.0])]
    arms = by_arm([*rows, *rows_of("kd", [1.9, 2.0])])
    panels = plots.compute_panels(arms, {arm: [([0.0], [1.0])] for arm in arms})
    muon = ["reference@optimizer=muon", "random@optimizer=muon@learning_rate=4e-3", "ends@optimizer=muon"]
    shown = {optimizer: [arm.name for arm in panel] for optimizer, panel in panels.items()}
    assert shown == {None: ["reference", "random", "ends", "kd_inherit"], "muon": muon}
