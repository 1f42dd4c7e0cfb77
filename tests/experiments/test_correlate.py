"""tools/correlate.py. pytest tests/experiments/test_correlate.py"""

import numpy as np
import pytest

from tools.correlate import ranks, spearman


def test_ranks_share_ties():
    assert ranks(np.array([3, 1, 1, 7])).tolist() == [2, 0.5, 0.5, 3]


def test_spearman():
    x = np.array([1.0, 2, 3, 4, 5])
    rho, p = spearman(x, np.array([1.0, 4, 9, 16, 25]))
    assert rho == pytest.approx(1) and p == pytest.approx(2 / 120, abs=0.002)
    assert spearman(x, -x)[0] == pytest.approx(-1)
    # 1 − 6 Σd² / (n (n² − 1)), d = 1, 1, 0, 1, 1
    assert spearman(x, np.array([2.0, 1, 3, 5, 4]))[0] == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(x, np.ones(5)) == (0, 1)
