"""As many threads as the process may run. pytest tests/base/test_cpus.py"""

import builtins
import io
import os

import pytest

from inheritune.base.cpus import usable_cpus


@pytest.mark.parametrize(
    "allowed, quota, cpus",
    [
        (8, None, 8),
        (8, "max 100000", 8),
        (8, "350000 100000", 3),
        (8, "50000 100000", 1),
        (2, "800000 100000", 2),
    ],
)
def test_a_scheduler_and_a_container_give_fewer(monkeypatch, allowed, quota, cpus):
    def read(path, **options):
        if quota is None:
            raise FileNotFoundError(path)
        return io.StringIO(quota)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    monkeypatch.setattr(builtins, "open", read)
    found = usable_cpus()
    monkeypatch.undo()
    assert found == cpus
