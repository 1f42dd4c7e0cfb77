"""`make gpu` on machines without a GPU: every step at toy size, with no more installed than it asks for."""

import csv
import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT

LACKING = ("datasets", "pyarrow", "requests", "pandas", "zstandard")
# xl and large are the same as gpt2 at toy size
STEPS = "peak gpt2 graphs variants losses sampling"


def run(tmp_path, *argv):
    """A finished Python process in which nothing of LACKING can be imported, nor in its children."""
    code = f"import sys; sys.modules.update(dict.fromkeys({LACKING}))"
    (tmp_path / "sitecustomize.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_every_step_does_what_it_should_at_toy_size(tmp_path):
    out = str(tmp_path / "out")
    done = run(tmp_path, "bench/gpu.py", f"--toy={out}", *STEPS.split())
    with open(f"{out}/gpu.csv") as f:
        verdicts = {r["name"]: r["verdict"] for r in csv.DictReader(f)}
    ended = [name.split(":")[0] for name in verdicts if name.endswith(": the step took")]
    assert ended == STEPS.split()
    assert set(verdicts.values()) == {"", "reached"}, done.stdout
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_ended(tmp_path):
    code = f"""
import json, sys
sys.path.insert(0, "bench")
from gpu_harness import Place, run_step
print(json.dumps(run_step("bench/gpu.py", "losses", Place("{tmp_path}", "cpu", 1.0), 3)))
"""
    done = run(tmp_path, "-c", code)
    assert "losses: the step took" in done.stdout and "failed: not done after 3 s" in done.stdout, done.stderr
