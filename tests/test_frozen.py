"""What an earlier version wrote is read, continued and scored as before.

tests/frozen/data and tests/frozen/run were written at revision ad6b56c: 12 steps, of which the checkpoint of
step 8 was kept; log.csv is the whole run's."""

import os
import shutil

import numpy as np
import pytest

import score
import train
from inheritune.base.files import read_json
from tests.tiny import ROOT, rows

FROZEN = os.path.join(ROOT, "tests", "frozen")
FLAGS = {"dataset": "data", "out_dir": "run", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
FLAGS |= {"batch_tokens": 128, "batch_size": 4, "eval_interval": 4, "eval_tokens": 400, "log_interval": 1}
FLAGS |= {"warmup_iters": 3, "learning_rate": 0.01, "min_lr": 0.001, "dropout": 0.1, "max_iters": 12}
FLAGS |= {"device": "cpu", "threads": 1, "resume": "must"}


def test_a_run_of_an_earlier_version_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    shutil.copytree(FROZEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    expected = rows(os.path.join(FROZEN, "run"))
    train.main([f"--{key}={value}" for key, value in FLAGS.items()])
    found = rows("run")
    assert [list(row) for row in found] == [list(row) for row in expected]
    numbers, wanted = (np.array([[v or 0.0 for v in row.values()] for row in x]) for x in (found, expected))
    assert numbers == pytest.approx(wanted, rel=1e-5)
    score.main(["--ckpt", "run/latest", "--data", "data", "--device", "cpu", "--out", "score.json"])
    assert read_json("score.json")["loss"]["loss"] == pytest.approx(4.1071, abs=1e-4)
