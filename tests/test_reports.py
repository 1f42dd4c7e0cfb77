"""What people ran into: each test is named by what somebody did. pytest tests/test_reports.py"""

import os

import pytest

import train
from inheritune.training.parsing import NANOGPT, parse
from inheritune.training.settings import GrowSettings, ReplicateSettings, TrainSettings
from tests.tiny import arguments, refusal

OUR_NAMES = TrainSettings.__dataclass_fields__


# Settings


@pytest.mark.parametrize("name", NANOGPT)
def test_a_person_brings_nanogpts_config(tmp_path, name):
    """The line says what to write instead, and in a file where."""
    (tmp_path / "theirs.py").write_text(f"n_layer = 2\n{name} = 5\n")
    said = refusal(train.main, [str(tmp_path / "theirs.py")])
    assert said == f"train.py: {tmp_path}/theirs.py:2: {name} is not a setting but nanoGPT's: {NANOGPT[name]}"
    assert name not in OUR_NAMES
    for flag in (f"--{name}=5", f"--{name.replace('_', '-')}"):
        assert refusal(train.main, [flag]) == f"train.py: {flag.split('=')[0]} is nanoGPT's: {NANOGPT[name]}"


def test_a_person_writes_a_path_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.py").write_text('dataset = "~/data"\nteacher = "~/teacher"\n')
    argv = [str(tmp_path / "config.py"), "--out_dir=~/run", "--init_from=~/ref", "--results=~/r"]
    argv += ["--reference=~/ref", "--reference_config=~/ref.py"]
    train_settings, rep, _ = parse((TrainSettings, ReplicateSettings), argv, "")
    found = [train_settings.dataset, train_settings.teacher, train_settings.out_dir, train_settings.init_from]
    found += [rep.results, rep.reference, rep.reference_config]
    names = ("data", "teacher", "run", "ref", "r", "ref", "ref.py")
    assert found == [os.path.join(tmp_path, name) for name in names]
    grow, _ = parse((GrowSettings,), argv[-2:], "")
    assert grow.reference == str(tmp_path / "ref") and grow.reference_config == str(tmp_path / "ref.py")
