"""The comparison: its arms, its arithmetic, a small one from end to end. python -m pytest tests/test_replicate.py"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import replicate
import train
from inheritune.base.errors import UserError
from inheritune.experiments import arms
from inheritune.experiments import tables as compare
from inheritune.experiments.arms import ARMS, impossible, parse_arms
from inheritune.training.parsing import parse
from inheritune.training.planning import costs
from inheritune.training.settings import ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint
from model import GPT, GPTConfig
from tests.tiny import ROOT, refusal, rows, write_checkpoint, write_data

REFERENCE = """
n_layer = 4
n_head = 2
n_embd = 16
block_size = 8
batch_tokens = 64
batch_size = 8
max_iters = 12
eval_interval = 4
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 3
"""
COMPARISON = """
layers = 2
rounds_from = 1
rounds_step = 1
seen = 0.5
batch_tokens = 64
batch_size = 8
max_iters = 6
eval_interval = 3
eval_tokens = 200
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 3
threads = 1
jobs = 1
device = "cpu"
"""


def write_config(folder, **changes):
    """A data folder, a reference config and a comparison in `folder`; returns the comparison's path."""
    data = write_data(folder / "data", val=600)
    (folder / "reference.py").write_text(REFERENCE)
    lines = {"dataset": data, "out_dir": str(folder / "out"), "results": str(folder / "results")}
    lines |= {"reference_config": str(folder / "reference.py"), "arms": "all:1", **changes}
    (folder / "c.py").write_text(COMPARISON + "".join(f"{k} = {v!r}\n" for k, v in lines.items()))
    return str(folder / "c.py")


def bench_of(path, *flags):
    """The first seed's Bench of a comparison."""
    settings, rep, given = parse((TrainSettings, ReplicateSettings), [path, *flags], "")
    benches, _, _ = replicate.check(settings, given, rep)
    return next(iter(benches.values()))


def in_process(request, command, stdout, stderr):
    """Request.call for train.py, without the process."""
    train.main(command[2:])
    return 0


def read_results(folder):
    """results.csv as {(arm, seed): {column: text}}, wall time left out."""
    with open(os.path.join(folder, "results.csv")) as f:
        found = {(r["arm"], int(r["seed"])): r for r in csv.DictReader(f)}
    assert all(float(r.pop("wall_s")) >= 0 for r in found.values())
    return found


def test_arms_and_their_seeds():
    assert list(parse_arms("all")) == list(ARMS) and set(parse_arms("all:2").values()) == {2}
    assert parse_arms("random:3") == {"reference": 3, "random": 3}
    assert parse_arms("all:1, inheritune:3")["reference"] == 3 and parse_arms("all:1 kd:0 random:2")["random"] == 2
    assert "kd" not in parse_arms("all:1 kd:0")
    assert parse_arms("inheritune_scaled:2")["reference_scaled"] == 2
    for text, message in (("inheritun", "did you mean inheritune?"), ("kd:two", "'kd:two' is not NAME:SEEDS")):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            parse_arms(text)


def test_every_arm_the_issue_names_is_there(tmp_path):
    b = bench_of(write_config(tmp_path))
    stages = {name: arm.stages(b, name) for name, arm in ARMS.items()}
    how = {name: [s.start[2:-2] for s in found] for name, found in stages.items()}
    assert how["random"] == how["kd"] == [()] == how["reference"] == how["random_matched"]
    assert how["inheritune"] == how["kd_inherit"] == how["unseen"] == [("--layers", "2")]
    assert how["released_slice"] == [("--layers", "2", "--released_slice")]
    assert how["half_width"] == [("--recipe", "half_width")]
    for recipe in ("hybrid", "last", "middle", "alternate", "first_plus_last"):
        assert how[recipe] == [("--layers", "2", "--recipe", recipe)]
    assert how["attn"] == [("--layers", "2", "--parts", "attn")] and how["mlp"] == [("--layers", "2", "--parts", "mlp")]
    assert how["attn_mlp"] == [("--layers", "2", "--parts", "attn+mlp", "--layernorms", "False")]
    assert how["stacking"] == [(), ("--recipe", "stack", "--layers", "2")]
    assert stages["stacking"][1].start[1] == stages["stacking"][0].run + "/latest"
    assert how["rounds"] == [("--layers", "1"), ("--layers", "2")]
    assert how["onto"][1] == ("--layers", "2", "--onto", stages["onto"][0].run + "/latest")
    assert all(s.flags["data_end"] == 0.5 for name, found in stages.items() for s in found if name != "unseen")
    assert (stages["unseen"][0].flags["data_start"], stages["unseen"][0].flags["data_end"]) == (0.5, 1.0)
    assert stages["random_2x"][0].steps == 12 and stages["random_2x"][0].flags["lr_decay_iters"] is None
    assert stages["kd"][0].flags["teacher"] == b.reference and "teacher" not in stages["inheritune"][0].flags
    assert stages["inheritune_scaled"][0].start[1].endswith("reference_scaled/run/latest")
    assert stages["reference_scaled"][0].flags["scale_attn_by_inverse_layer_idx"] is True


def test_costs_count_every_stage_and_the_teacher(tmp_path):
    b = bench_of(write_config(tmp_path))
    small, large = costs(b.random("x", 2).config)[1], costs(b.config)[1]
    assert b.reference_flops == large * 12 * 64 and b.reference_layer_steps == 48
    (matched,), (kd,) = (ARMS[name].stages(b, name) for name in ("random_matched", "kd"))
    pipeline = large * 12 * 64 + small * 6 * 64
    assert abs(matched.steps * matched.flops_per_step - pipeline) <= matched.flops_per_step / 2
    assert kd.flops_per_step == pytest.approx((small + large / 3) * 64)
    first, second = ARMS["stacking"].stages(b, "stacking")
    assert (first.layer_steps, second.layer_steps) == (6, 12)


def test_what_cannot_be_made_is_left_out(tmp_path):
    b = bench_of(write_config(tmp_path, seen=1.0, layers=3))
    assert set(impossible(b)) == {"unseen", "stacking", "hybrid"}
    write_checkpoint(tmp_path / "given", n_layer=4, n_head=1)
    b = bench_of(write_config(tmp_path, reference_config="", reference=str(tmp_path / "given")))
    gone = {"reference_scaled", "inheritune_scaled", "unseen", "random_matched", "half_width"}
    assert set(impossible(b)) == gone


def test_first_reach_counts_earlier_stages(tmp_path):
    def stage(name, n_layer, losses):
        run = tmp_path / name
        run.mkdir()
        (run / "log.csv").write_text("step,val_loss\n" + "".join(f"{5 * i},{x}\n" for i, x in enumerate(losses)))
        return arms.Stage(str(run), GPTConfig(n_layer=n_layer), {"max_iters": 10, "batch_tokens": 1})

    a, b = stage("a", 1, [9, 8, 7]), stage("b", 2, [7, "", 5])
    (tmp_path / "b/log.csv").open("a").write("15,4\n")
    found = replicate.first_reach([a, b], 5)
    assert found["reached_step"] == 20 and found["reached_layer_steps"] == 10 + 20
    assert found["reached_flops"] == 10 * a.flops_per_step + 10 * b.flops_per_step
    assert replicate.first_reach([a, b], 8)["reached_step"] == 5
    assert set(replicate.first_reach([a, b], 3).values()) == {None}


def test_wall_seconds_add_up_over_interruptions(tmp_path):
    lines = ["0,0,0", "5,10,1", "10,20,2", "15,4,0.5", "20,8,1"]  # continued once behind step 10
    (tmp_path / "timing.csv").write_text("step,train_s,val_s\n" + "\n".join(lines) + "\n")
    assert replicate.wall_seconds(str(tmp_path)) == 22 + 9


def test_statistics_against_numpy():
    ours = [{"seed": s, "val_loss": v} for s, v in ((1, 2.0), (2, 2.3), (3, 2.1))]
    theirs = [{"seed": s, "val_loss": v} for s, v in ((2, 2.6), (1, 2.2), (4, 9.0))]
    assert compare.paired(ours, theirs) == pytest.approx([-0.2, -0.3])
    values = [2.0, 2.3, 2.1]
    mean, error = compare.mean_and_error(values)
    assert (mean, error) == pytest.approx((np.mean(values), np.std(values, ddof=1) / np.sqrt(3)))
    assert compare.with_error([0.25], "+") == "+0.2500" and compare.with_error([]) == "–"
    assert compare.with_error([1.0, 3.0]) == "2.0000 ± 1.0000"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of ten arms, two seeds of some, run to its end in this process; (config path, folder)."""
    folder = tmp_path_factory.mktemp("replicate")
    chosen = "reference:2 random:2 inheritune:2 kd_inherit half_width stacking onto random_matched attn rounds"
    path = write_config(folder, arms=chosen)
    patch = pytest.MonkeyPatch()
    patch.setattr(replicate.Request, "call", in_process)
    replicate.main([path])
    patch.undo()
    return path, folder


def test_small_comparison(finished):
    _, folder = finished
    found = read_results(folder / "results")
    assert len(found) == 13 and ("random", 2) in found and ("kd_inherit", 2) not in found
    for (arm, seed), row in found.items():
        last = ARMS[arm].stages(bench_of(finished[0], f"--first_seed={seed}"), arm)[-1]
        assert float(row["val_loss"]) == rows(last.run)[-1]["val_loss"]
        model = GPT.from_pretrained(checkpoint.find(last.run, prefer="latest"))
        assert int(row["params"]) == model.num_params() and int(row["n_layer"]) == model.config.n_layer
        assert not os.path.exists(last.start_folder)
    own, whole = (float(found["inheritune", 1][key]) for key in ("flops", "flops_with_reference"))
    assert whole - own == float(found["reference", 1]["flops"])
    assert found["rounds", 1]["val_loss"] == found["inheritune", 1]["val_loss"]  # its last round is that very run
    assert float(found["rounds", 1]["flops"]) > own
    table = (folder / "results/table.md").read_text()
    assert "| Inheritune | 2 |" in table and "±" in table and table.count("\n| ") == 10
    for name in ("curves.png", "rank.png"):
        assert (folder / "results" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_deleted_arm_comes_back_the_same(finished, monkeypatch):
    """Acceptance: a row is reproduced exactly, wall time excepted; what is there is not touched."""
    path, folder = finished
    before = read_results(folder / "results")
    shutil.rmtree(folder / "out/seed_1/kd_inherit")
    shutil.rmtree(folder / "out/seed_1/stacking/stage_1")
    monkeypatch.setattr(replicate.Request, "call", in_process)
    times = {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("row.json")}
    replicate.main([path])
    assert read_results(folder / "results") == before
    changed = {p.parent.name for p in times if p.stat().st_mtime_ns != times[p]}
    assert changed == {"stacking"} and (folder / "out/seed_1/kd_inherit/row.json").exists()


def test_models_before_training_are_those_that_were_trained(finished, monkeypatch):
    """The random init that is analysed is the one whose loss train.py logged at step 0."""
    path, _ = finished
    seen = []
    monkeypatch.setattr(replicate, "max_ranks", lambda settings, model: seen.append(model) or [1.0])
    settings, rep, _ = parse((TrainSettings, ReplicateSettings), [path], "")
    b = bench_of(path)
    replicate.make_row(settings, rep, b, "random", 1, None)
    val = replicate.grow.ValData(settings.dataset, 8, settings.eval_tokens, settings.batch_size)
    device = torch.device("cpu")
    loss = replicate.grow.mean_loss(seen[0].eval(), val, replicate.grow.Ranks(), device, torch.float32)
    assert loss == pytest.approx(rows(b.of("random"))[0]["val_loss"], rel=1e-6)


def test_other_settings_are_refused(finished):
    path, _ = finished
    assert "was made with other settings" in refusal(replicate.main, [path, "--max_iters=7"])
    assert "was made with other settings" in refusal(replicate.main, [path, "--kd_alpha=0.1"])


def test_a_given_reference(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "given", n_layer=4)
    path = write_config(
        tmp_path, reference_config="", reference=str(tmp_path / "given"), arms="all:0 inheritune random"
    )
    monkeypatch.setattr(replicate.Request, "call", in_process)
    replicate.main([path])
    with open(tmp_path / "results/results.csv") as f:
        found = {r["arm"]: r for r in csv.DictReader(f)}
    assert found["reference"]["flops"] == found["inheritune"]["flops_with_reference"] == ""
    assert set(found) == {"reference", "random", "inheritune"} and float(found["reference"]["val_loss"]) > 0


def test_failed_training_is_one_line(tmp_path, monkeypatch):
    path = write_config(tmp_path, arms="random")
    shutil.rmtree(tmp_path / "data")
    write_data(tmp_path / "data", val=5)  # too short to validate on: train.py will say so

    def fail(request, command, stdout, stderr):
        stdout.write("train.py: val has 5 tokens\n")
        return 1

    monkeypatch.setattr(replicate.Request, "call", fail)
    message = refusal(replicate.main, [path])
    assert "did not finish (train.py: val has 5 tokens); run the same command again" in message
    assert not (tmp_path / "results").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    path = write_config(tmp_path, layers=3)
    replicate.main([path, "--dry_run"])
    text = capsys.readouterr().out
    assert "3 blocks x 16 for 12 steps" in text and "left out: 3 blocks are not twice" in text
    assert "arms × seeds" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms=inheritun"], "there is no arm 'inheritun' (did you mean inheritune?)"),
        (["--arms=all:0"], "there is nothing to do"),
        (["--layers=4"], "layers 4 must be below the reference's 4 blocks"),
        (["--layers=1", "--rounds_from=2"], "rounds_from 2 at most layers"),
        (["--reference=x"], "set one of reference_config"),
        (["--reference_config="], "set one of reference_config"),
        (["--seed=3"], "seed is decided by the arms"),
        (["--n_embd=32"], "n_embd is the reference's"),
        (["--batch_tokens=60"], "not a multiple of block_size"),
        (["--jobs=99"], "jobs 99: at most"),
        (["--arm=x"], "did you mean --arms"),
        (["--k_start=2"], "unknown argument '--k_start=2'"),
    ],
)
def test_refusals(tmp_path, flags, message):
    shown = refusal(replicate.main, [write_config(tmp_path), *flags])
    assert message in shown and not (tmp_path / "out").exists() and not (tmp_path / "results").exists()


def test_train_points_to_replicate(tmp_path):
    assert "but one of grow.py or replicate.py" in refusal(train.main, [write_config(tmp_path)])


def test_paper_figure(tmp_path):
    shutil.copy(os.path.join(ROOT, "results/paper.csv"), tmp_path / "paper.csv")
    compare.main([str(tmp_path / "paper.csv")])
    assert (tmp_path / "paper.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "has columns" in refusal(compare.main, [__file__])
    assert "holds no rows" in refusal(compare.main, [tmp_path / "nowhere.csv"])


@pytest.mark.slow
def test_smoke_of_every_arm_killed_and_continued(tmp_path):
    """Acceptance: all arms run in processes of their own, are killed together, go on, and a deleted one comes back."""
    data = write_data(tmp_path / "data", train=60_000, val=9000)
    command = [sys.executable, "replicate.py", "config/replicate_smoke.py", f"--dataset={data}"]
    command += [f"--out_dir={tmp_path / 'out'}", f"--results={tmp_path / 'results'}", "--max_iters=20"]
    environment = os.environ | {"PYTHONPATH": ROOT}

    def finished_rows():
        return len(list((tmp_path / "out").rglob("row.json")))

    for count in (1, 6):  # with references and with small models under way
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        while finished_rows() < count and process.poll() is None:
            time.sleep(0.2)
        time.sleep(3)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    found = read_results(tmp_path / "results")
    assert {arm for arm, _ in found} == set(ARMS) and len(found) == 26
    assert found["rounds", 1]["val_loss"] == found["inheritune", 1]["val_loss"]
    for arm in ("reference", "stacking", "kd"):
        shutil.rmtree(tmp_path / "out/seed_1" / arm)
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert read_results(tmp_path / "results") == found
    json.loads((tmp_path / "out/seed_1/kd/row.json").read_text())


def test_a_variant_is_an_arm_with_settings_of_its_own(tmp_path):
    b = bench_of(write_config(tmp_path))
    assert list(parse_arms("ends@max_iters=3:2 random")) == ["reference", "random", "ends@max_iters=3"]
    (plain,), name = ARMS["ends"].stages(b, "ends"), "ends@max_iters=3@optimizer=muon"
    (stage,) = arms.find_arm(name).stages(b, name)
    assert stage.flags == plain.flags | {"max_iters": 3, "optimizer": "muon"} and stage.start == plain.start
    assert stage.run == b.of(name) and arms.find_arm(name).label.endswith(", max_iters 3, optimizer muon")
    (reference,) = arms.find_arm("reference@optimizer=muon").stages(b, "reference@optimizer=muon")
    assert reference.flags["optimizer"] == "muon"
    assert replicate.settings_hash(b, name) != replicate.settings_hash(b, "ends@max_iters=3")
    for wrong in ("ends@max_itres=3", "ends@max_iters=x", "edns@max_iters=3"):
        with pytest.raises(UserError):
            parse_arms(wrong)


def test_where_a_run_is_made_is_not_what_it_is(tmp_path):
    path = write_config(tmp_path)
    machine = ("--threads=2", "--batch_size=4", "--compile=True", f"--out_dir={tmp_path}/elsewhere", "--jobs=1")
    here = replicate.settings_hash(bench_of(path), "kd")
    assert here == replicate.settings_hash(bench_of(path, *machine), "kd")
    assert here != replicate.settings_hash(bench_of(path, "--eval_interval=2"), "kd")
    assert here != replicate.settings_hash(bench_of(path, "--max_iters=7"), "kd")
