"""A round or more of everything that torture.py breaks runs with, for two minutes and a half.

pytest tests/stress -m slow
"""

import os
import random
import signal
import subprocess
import time

import pytest

from inheritune.weights import checkpoint
from tests.stress import torture
from tests.tiny import ROOT, rows


@pytest.mark.slow
def test_nothing_that_is_broken_costs_anything(tmp_path):
    cheap = [k for k in torture.KINDS if k[1] is torture.Train or issubclass(k[1], torture.Prepare)]
    tallies = torture.torture(100, 5, str(tmp_path), cheap)
    tallies |= torture.torture(
        30, 5, str(tmp_path / "ranks"), [k for k in torture.KINDS if k[1] is torture.TwoRanks]
    )
    assert sum(t.mismatches for t in tallies.values()) == 0
    assert (
        all(tallies[title].faults for title, _, _ in cheap) and sum(t.faults for t in tallies.values()) > 50
    )
    assert "mismatches = 0" in torture.table(tallies, "x", 1).splitlines()[-1]


@pytest.fixture
def ranks(tmp_path):
    return torture.TwoRanks(str(tmp_path), random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_agree_on_the_step_at_which_one_was_asked_to_end(ranks, rank):
    """SIGTERM to one rank alone: both save, and the job, run again, ends as if nothing had happened."""
    out = ranks.new()
    command = [part for part in ranks.command(out) if not part.startswith("--max-restarts")]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while not os.path.exists(f"{out}/log.csv") or len(rows(out)) < 20:
        time.sleep(0.05)
    workers = torture.descendants(process.pid)
    of_rank = {int(environment(pid)["RANK"]): pid for pid in workers if "RANK" in environment(pid)}
    os.kill(of_rank[rank], signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and said.count("train.py: SIGTERM: saved ") == 1
    step = int(checkpoint.list_steps(out)[-1][5:])
    assert step >= rows(out)[-1]["step"] and step % 40
    assert ranks.finish(out) == ranks.undisturbed


def environment(pid):
    with open(f"/proc/{pid}/environ") as f:
        return dict(pair.split("=", 1) for pair in f.read().split("\0") if "=" in pair)
