"""A round or more of everything that torture.py breaks runs with, for two minutes and a half."""

import pytest

from tests.stress import torture


@pytest.mark.slow
def test_nothing_that_is_broken_costs_anything(tmp_path):
    cheap = [k for k in torture.KINDS if k[1] is torture.Train or issubclass(k[1], torture.Prepare)]
    ranks = [k for k in torture.KINDS if k[1] is torture.TwoRanks]
    tallies = torture.torture(100, 5, str(tmp_path), cheap)
    tallies |= torture.torture(30, 5, str(tmp_path / "ranks"), ranks)
    assert sum(t["mismatches"] for t in tallies.values()) == 0
    assert all(tallies[k[0]]["faults"] for k in cheap) and sum(t["faults"] for t in tallies.values()) > 50
    assert "mismatches = 0" in torture.table(tallies, "x", 1).splitlines()[-1]
