"""The arms: what each trains from what, what it costs, what it is."""

import csv
import os

import pytest
import torch

from inheritune.base.errors import UserError
from inheritune.experiments.arms import ARMS, find_arm, impossible, parse_arms, settings_hash
from inheritune.experiments.stages import run_problems
from tests.experiments.comparison import common_of, write_config
from tests.tiny import ROOT, write_checkpoint


def names(text):
    return {arm.name: count for arm, count in parse_arms(text).items()}


def test_arms_and_their_seeds():
    assert list(names("all")) == list(ARMS) and set(names("all:2").values()) == {2}
    assert names("random:3") == {"reference": 3, "random": 3}
    assert names("all:1, inheritune:3")["reference"] == 3 and names("all:1 kd:0 random:2")["random"] == 2
    assert "kd" not in names("all:1 kd:0")
    assert list(names("ends@max_iters=3:2 random")) == ["reference", "random", "ends@max_iters=3"]
    for text, message in (
        ("inheritun", "did you mean inheritune?"),
        ("kd:two", "'kd:two' is not NAME:SEEDS"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            parse_arms(text)


def test_what_arms_of_several_stages_start_from(tmp_path):
    """(What every other arm starts from is in its hash, below.)"""
    c = common_of(write_config(tmp_path))
    stages = {name: find_arm(name).stages(c) for name in ARMS}
    half, stack = stages["stacking"]
    assert stack.start_options["ckpt"] == half.run + "/latest" and half.start_options == {}
    assert [s.start_options["layers"] for s in stages["rounds"]] == [1, 2]
    assert stages["onto"][1].start_options["onto"] == stages["onto"][0].run + "/latest"
    ends = {name: {s.flags["data_end"] for s in found} for name, found in stages.items()}
    assert ends.pop("unseen") == {1.0} and set.union(*ends.values()) == {0.5}
    assert stages["unseen"][0].flags["data_start"] == 0.5


def test_costs_count_every_stage_and_the_teacher(tmp_path):
    c = common_of(write_config(tmp_path))
    small, large = c.random("x", 2).config.flops_per_token, c.config.flops_per_token
    assert c.reference_cost == (large * 12 * 64, 48)
    (matched,), (kd,) = (find_arm(name).stages(c) for name in ("random_matched", "kd"))
    pipeline = large * 12 * 64 + small * 6 * 64
    assert abs(matched.steps * matched.flops_per_step - pipeline) <= matched.flops_per_step / 2
    assert kd.flops_per_step == pytest.approx((small + large / 3) * 64)
    first, second = find_arm("stacking").stages(c)
    assert (first.layer_steps, second.layer_steps) == (6, 12)


def test_what_cannot_be_made_is_left_out(tmp_path):
    c = common_of(write_config(tmp_path, seen=1.0, layers=3))
    assert set(impossible(c)) == {"unseen", "stacking", "hybrid"}
    write_checkpoint(tmp_path / "given", n_layer=4, n_head=1)
    c = common_of(write_config(tmp_path, reference_config="", reference=str(tmp_path / "given")))
    assert set(impossible(c)) == {"unseen", "random_matched", "half_width"}


def test_a_variant_is_an_arm_with_settings_of_its_own(tmp_path):
    c = common_of(write_config(tmp_path))
    arm = find_arm("ends@max_iters=3@optimizer=muon")
    assert (arm.base, arm.changes) == ("ends", {"max_iters": 3, "optimizer": "muon"})
    (plain,), (stage,) = find_arm("ends").stages(c), arm.stages(c)
    changed = {"max_iters": 3, "lr_decay_iters": None, "optimizer": "muon"}  # the schedule ends with the run
    assert stage.flags == plain.flags | changed and stage.start_options == plain.start_options
    assert stage.run == f"{c.folder}/{arm.name}/run" and arm.label.endswith(", 3 steps, Muon")
    label = find_arm("random@learning_rate=8e-3@min_lr=8e-4@batch_size=2").label
    assert label == "random init, lr 0.008", "batch_size changes no number, min_lr goes with the rate"
    (reference,) = find_arm("reference@optimizer=muon").stages(c)
    assert reference.flags["optimizer"] == "muon"
    assert settings_hash(c, arm) != settings_hash(c, find_arm("ends@max_iters=3"))
    (kd,) = find_arm("kd@kd_alpha=0.3").stages(common_of(write_config(tmp_path, kd_alpha=0.5)))
    assert kd.flags["kd_alpha"] == 0.3
    fixed = ("ends@seed=3", "ends@stop_at_val_loss=1", "ends@dataset=elsewhere")
    for wrong in ("ends@max_itres=3", "ends@max_iters=x", "edns@max_iters=3", *fixed):
        with pytest.raises(UserError):
            parse_arms(wrong)


def test_where_a_run_is_made_is_not_what_it_is(tmp_path):
    path, kd = write_config(tmp_path), find_arm("kd")
    machine = ("--threads=2", "--batch_size=4", "--compile=True", "--jobs=1")
    here = settings_hash(common_of(path), kd)
    assert here == settings_hash(common_of(path, *machine, f"--out_dir={tmp_path}/elsewhere"), kd)
    assert here != settings_hash(common_of(path, "--eval_interval=2"), kd)
    assert here != settings_hash(common_of(path, "--max_iters=7"), kd)


@pytest.mark.parametrize("name", ["mini", "english"])
def test_hashes_of_the_committed_results_stay_the_same(name, monkeypatch):
    """Of every row but random_matched's, whose number of steps depends on the data's vocabulary."""
    monkeypatch.chdir(ROOT)
    with open(os.path.join("results", name, "results.csv")) as f:
        rows = [r for r in csv.DictReader(f) if r["arm"] != "random_matched"]
    commons = {}
    for seed in {r["seed"] for r in rows}:
        arms = "--arms=reference:1 " + " ".join({r["arm"] for r in rows if r["seed"] == seed})
        commons[seed] = common_of(f"config/replicate_{name}.py", f"--first_seed={seed}", arms)
    for r in rows:
        assert settings_hash(commons[r["seed"]], find_arm(r["arm"])) == r["settings_hash"], r["arm"]


def test_every_arm_keeps_its_hash(monkeypatch):
    """Also those without a committed row, and those of a reference that sees a part of the data."""
    monkeypatch.chdir(ROOT)
    c = common_of("config/replicate_mini.py", "--arms=all:1")
    hashes = {
        "rounds": "42980a6df232",
        "influence": "6d11b92da39a",
        "consecutive": "86ed459b79ec",
        "greedy": "a2d794c0cdfe",
        "whole": "9dad596133da",
        "kd@kd_alpha=0.3": "3ab244b4c01a",
        "ends@teacher=reference": "6026e5794c5f",
    }
    assert hashes == {name: settings_hash(c, find_arm(name)) for name in hashes}
    c, plain = common_of("config/replicate_mini.py", "--kd_alpha=0.3"), common_of("config/replicate_mini.py")
    assert settings_hash(c, find_arm("random")) == settings_hash(plain, find_arm("random"))
    assert settings_hash(c, find_arm("kd")) != settings_hash(plain, find_arm("kd"))
    c = common_of("config/replicate_mini.py", "--seen=0.5")
    assert settings_hash(c, find_arm("unseen")) == "dded1bbba15c"
    with open("results/mini/results.csv") as f:
        made = {r["arm"].partition("@")[0] for r in csv.DictReader(f)}
    assert set(ARMS) <= made | set(hashes) | {"unseen"}, "a new arm: name its hash here"


def test_wrong_settings_of_any_stage_are_found_before_training(tmp_path, monkeypatch):
    c = common_of(write_config(tmp_path))
    (problem,) = run_problems(find_arm("random@min_lr=1").stages(c) * 2)
    assert "min_lr 1 is above learning_rate 0.01" in problem
    (problem,) = run_problems(find_arm("kd@batch_tokens=60").stages(c))
    assert "not a multiple of block_size" in problem
    assert run_problems([s for name in ARMS for s in find_arm(name).stages(c)]) == []
    c.flags["device"] = "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    (problem,) = run_problems(find_arm("random").stages(c))
    assert "block_size × ranks = 8 × 7" in problem
