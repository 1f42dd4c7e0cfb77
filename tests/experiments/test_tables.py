"""Means, errors, differences, verdicts. pytest tests/experiments/test_tables.py"""

import numpy as np
import pytest

from inheritune.experiments import tables


def test_statistics_against_numpy():
    ours = [{"seed": s, "val_loss": v} for s, v in ((1, 2.0), (2, 2.3), (3, 2.1))]
    theirs = [{"seed": s, "val_loss": v} for s, v in ((2, 2.6), (1, 2.2), (4, 9.0))]
    assert tables.paired(ours, theirs) == pytest.approx([-0.2, -0.3])
    values = [2.0, 2.3, 2.1]
    mean, error = tables.mean_and_error(values)
    assert (mean, error) == pytest.approx((np.mean(values), np.std(values, ddof=1) / np.sqrt(3)))
    assert tables.with_error([0.25], "+") == "+0.2500" and tables.with_error([]) == "–"
    assert tables.with_error([1.0, 3.0]) == "2.0000 ± 1.0000†"


def test_verdicts_say_which_way_it_fell():
    keys = ("arm", "n_layer", "params", "tokens", "flops", "val_loss", "folder")

    def arm(name, loss, n_layer=2, flops=1.0):
        return dict(zip(keys, (name, n_layer, 10 * n_layer, 5, flops, loss, name), strict=True))

    arms = [arm("reference", 2.0, 4), arm("inheritune", 1.9), arm("random", 2.5), arm("random_matched", 1.8)]
    text = " ".join(tables.verdicts(arms, 2.0))
    assert "0.1000 below its loss: matched" in text and "0.6000 below" in text and "0.1000 above" in text
    assert "Plain longer training wins" in text
    arms[-1]["val_loss"] = 2.4
    assert "Inheriting wins even" in " ".join(tables.verdicts(arms, 2.0))
