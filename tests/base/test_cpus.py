"""As many threads as the process may run."""

import builtins
import io
import os

import pytest

from inheritune.base.cpus import usable_cpus


@pytest.mark.parametrize(
    "quota, cpus", [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1), ("900000 100000", 8)]
)
def test_a_scheduler_and_a_container_give_fewer(monkeypatch, quota, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(builtins, "open", lambda path, **options: io.StringIO(quota))
    found = usable_cpus()
    monkeypatch.undo()
    assert found == cpus
