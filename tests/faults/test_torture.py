"""A round or more of everything that bench/torture.py breaks runs with, for two minutes and a half.

pytest tests/faults -m slow
"""

import os
import sys

import pytest
from tiny import ROOT

sys.path.insert(0, os.path.join(ROOT, "bench"))


@pytest.mark.slow
def test_nothing_that_is_broken_costs_anything(tmp_path):
    import torture

    cheap = [k for k in torture.KINDS if k[1] is torture.Train or issubclass(k[1], torture.Prepare)]
    tallies = torture.torture(100, 5, str(tmp_path), cheap)
    tallies |= torture.torture(30, 5, str(tmp_path / "ranks"), [k for k in torture.KINDS if k[1] is torture.TwoRanks])
    assert sum(t.mismatches for t in tallies.values()) == 0
    assert all(tallies[title].faults for title, _, _ in cheap) and sum(t.faults for t in tallies.values()) > 50
    assert "mismatches = 0" in torture.table(tallies, "x", 1).splitlines()[-1]
