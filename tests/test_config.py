"""Every file in config/ is read and planned, as --dry_run does."""

import dataclasses
import glob
import os
import re

import pytest

import grow
import replicate
import train
from inheritune.training.command_line import parse, read_config_file
from inheritune.training.settings import GrowSettings, ReplicateSettings, TrainSettings
from tests.tiny import ROOT, refusal

CONFIGS = sorted(os.path.basename(p) for p in glob.glob(os.path.join(ROOT, "config", "*.py")))
PARAMETERS = {
    "train_gpt2_medium.py": 354_599_936,
    "train_gpt2_large.py": 773_582_080,
    "train_gpt2_xl.py": 1_556_840_000,
    "train_gpt2_large_fineweb.py": 694_928_640,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = os.path.join("config", name)
    keys = read_config_file(path).keys()
    if "arms" in keys:
        script, words = replicate, ("inheritune", "FLOPs")
        reference = parse((TrainSettings, ReplicateSettings), [path], "")[1].reference
        if not os.path.isdir(reference or "config"):  # runs/ makes it
            assert f"no folder {reference!r} here" in refusal(replicate.main, [path, "--dry_run"])
            return
    else:
        grows = keys & GrowSettings.__dataclass_fields__.keys()
        script, words = (grow, ("FLOPs",)) if grows else (train, ("parameters", "memory", "FLOPs"))
    script.main([path, "--dry_run"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)
    if name in PARAMETERS:
        found = re.search(r"parameters +([\d,]+)", shown)[1]
        assert int(found.replace(",", "")) == PARAMETERS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_holds_what_differs_from_the_defaults(name):
    defaults = dataclasses.asdict(TrainSettings())
    values = read_config_file(os.path.join(ROOT, "config", name))
    assert not [key for key, (value, _) in values.items() if key in defaults and value == defaults[key]]
