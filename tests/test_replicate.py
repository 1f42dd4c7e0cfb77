"""The comparison: a small one from end to end, its report, what it refuses."""

import csv
import dataclasses
import glob
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

import replicate
from inheritune.base.errors import UserError
from inheritune.base.signals import StopRequest
from inheritune.data.reader import ValData
from inheritune.experiments import measurements, plots
from inheritune.experiments.arms import ARMS, PARTS_OF_GPT2, find_arm
from inheritune.models.initialisations import Recipe, check_fits
from inheritune.models.open_model import open_config
from inheritune.training.command_line import parse
from inheritune.training.distributed import Ranks
from inheritune.training.losses import mean_loss
from inheritune.training.settings import ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint
from tests import other_models
from tests.experiments.comparison import common_of, in_process, write_config
from tests.tiny import ROOT, refusal, rows, write_data


def read_results(folder):
    """results.csv as {(arm, seed): {column: text}}, wall time left out."""
    with open(os.path.join(folder, "results.csv")) as f:
        found = {(r["arm"], int(r["seed"])): r for r in csv.DictReader(f)}
    assert all(float(r.pop("wall_s") or 0) >= 0 for r in found.values())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config path, folder) of a comparison of six arms that ran to its end in this process."""
    folder = tmp_path_factory.mktemp("replicate")
    path = write_config(folder, arms="random inheritune:2 kd_inherit stacking rounds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "call", in_process)
        patch.setattr(measurements, "SEQUENCES", 5)  # windows for the ranks
        replicate.main([path])
    return path, folder


def test_small_comparison(finished):
    _, folder = finished
    found = read_results(folder / "results")
    assert len(found) == 8 and ("inheritune", 2) in found and ("kd_inherit", 2) not in found
    for (arm, seed), row in found.items():
        last = find_arm(arm).stages(common_of(finished[0], f"--first_seed={seed}"))[-1]
        assert float(row["val_loss"]) == rows(last.run)[-1]["val_loss"]
        config = open_config(checkpoint.find(last.run, prefer="latest"))
        assert int(row["params"]) == config.num_params and int(row["n_layer"]) == config.n_layer
        assert not os.path.exists(last.start_folder)
    own, whole = (float(found["inheritune", 1][key]) for key in ("flops", "flops_with_reference"))
    assert whole - own == float(found["reference", 1]["flops"])
    same = "its last round is that very run"
    assert found["rounds", 1]["val_loss"] == found["inheritune", 1]["val_loss"], same
    assert float(found["rounds", 1]["flops"]) > own
    table = (folder / "results/table.md").read_text()
    assert "| Inheritune | 2 |" in table and "±" in table and table.count("\n| ") == 1 + 6
    for name in ("curves.png", "compute.png"):
        assert (folder / "results" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def no_figures(monkeypatch):
    """A report trains nothing, and its figures take a while."""
    monkeypatch.setattr(StopRequest, "call", None)
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: plots.plt.close(figure))


def test_report_takes_in_what_another_folder_has(finished, no_figures, tmp_path, capsys):
    """Rows of a comparison that is still under way somewhere else, some arms not there yet."""
    path, folder = finished
    out = tmp_path / "out"
    for name in ("seed_1/reference", "seed_1/inheritune", "seed_2/reference"):
        shutil.copytree(folder / "out" / name, out / name, symlinks=True)
    replicate.main([path, "--report", f"--results={tmp_path}/results", f"--out_dir={out}"])
    assert set(read_results(tmp_path / "results")) == {("reference", 1), ("reference", 2), ("inheritune", 1)}
    assert "5 arms × seeds are not there yet" in capsys.readouterr().out
    flags = ["--report", f"--results={tmp_path}/none", f"--out_dir={tmp_path}/none"]
    assert "has no row of a reference" in refusal(replicate.main, [path, *flags])


GIVEN = ("config/replicate_mini.py", "--reference_config=", "--reference=x")
MUON = ("--optimizer=muon", "--learning_rate=8e-3", "--min_lr=8e-4", "--arms=inheritune@max_iters=1000")
HALVES = "--arms=random@max_iters=1000 inheritune@max_iters=1000"
LINEAR = "@schedule=linear@min_lr=0@warmup_iters=20:1"
PILOT = "--arms=inheritune@max_iters=475:1 "
PILOT += "inheritune@max_iters=430@optimizer=muon@learning_rate=8e-3" + LINEAR
PILOT += " random@max_iters=430@optimizer=muon@learning_rate=1.6e-2" + LINEAR
COMMITTED = {  # results: their replicate.py command, without where the given reference is
    "mini": ("config/replicate_mini.py",),
    "english": ("config/replicate_english.py",),
    "english/half": ("config/replicate_english.py", PILOT),
    "muon_reference": (*GIVEN, *MUON),
    "depth/4": (*GIVEN, "--layers=2", HALVES),
    "depth/12": (*GIVEN, "--layers=6", HALVES),
    "smollm2_cut": ("config/replicate_smollm2.py",),
}


@pytest.mark.parametrize("logs", glob.glob("results/**/logs", root_dir=ROOT, recursive=True))
def test_committed_tables_are_rebuilt_from_committed_logs(logs, no_figures, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = os.path.dirname(logs)
    shutil.copytree(logs, tmp_path / "results/logs")
    flags = ["--report", f"--results={tmp_path}/results", f"--out_dir={tmp_path}/none"]
    replicate.main([*COMMITTED[os.path.relpath(committed, "results")], *flags])
    for name in ("results.csv", "table.md"):
        with open(os.path.join(committed, name)) as f:
            assert (tmp_path / "results" / name).read_text() == f.read()


def test_rows_made_with_other_settings_stay_out_of_the_table(finished, tmp_path):
    """... also where they were made in another out_dir."""
    said = refusal(replicate.main, [finished[0], f"--out_dir={tmp_path}", "--max_iters=7"])
    assert "logs/seed_1/" in said and "was made with other settings" in said


def test_deleted_arm_comes_back_the_same(finished, monkeypatch):
    """Acceptance: a row is reproduced exactly, wall time excepted; what is there is not touched."""
    path, folder = finished
    before = read_results(folder / "results")
    shutil.rmtree(folder / "out/seed_1/kd_inherit")
    shutil.rmtree(folder / "out/seed_1/stacking/stage_1")
    monkeypatch.setattr(StopRequest, "call", in_process)
    monkeypatch.setattr(measurements, "SEQUENCES", 5)
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: plots.plt.close(figure))
    times = {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("row.json")}
    replicate.main([path])
    assert read_results(folder / "results") == before
    changed = {p.parent.name for p in times if p.stat().st_mtime_ns != times[p]}
    assert changed == {"stacking"} and (folder / "out/seed_1/kd_inherit/row.json").exists()


def test_models_before_training_are_those_that_were_trained(finished, monkeypatch):
    """The random init that is analysed is the one whose loss train.py logged at step 0."""
    path, _ = finished
    seen = []
    monkeypatch.setattr(measurements, "max_ranks", lambda settings, load: seen.append(load()) or [1.0])
    settings, rep, _ = parse((TrainSettings, ReplicateSettings), [path], "")
    c = common_of(path)
    measurements.make_row(settings, rep, c, find_arm("random"), None)
    val = ValData(settings.dataset, 8, settings.eval_tokens, settings.batch_size)
    loss = mean_loss(seen[0].eval(), val, Ranks(), torch.device("cpu"), torch.float32)
    assert loss == pytest.approx(rows(f"{c.folder}/random/run")[0]["val_loss"], rel=1e-6)


def test_arms_made_with_other_settings_or_tokens_are_refused(finished, monkeypatch):
    path, _ = finished
    assert "was made with other settings" in refusal(replicate.main, [path, "--max_iters=7"])
    assert "was made with other settings" in refusal(replicate.main, [path, "--kd_alpha=0.1"])
    # a folder of the same name and size, prepared from other text
    assert "was made with another final_tokens" in refusal(replicate.main, [path, "--final_tokens=16"])
    monkeypatch.setattr(measurements, "identity", lambda folder: "another")
    assert "was made with another data" in refusal(replicate.main, [path])


def test_any_decoder_as_the_given_reference(tmp_path, monkeypatch):
    """Arms of each kind for a Llama, and a report from the logs alone."""
    other_models.build("llama").save_pretrained(tmp_path / "llama")
    options = {"reference": str(tmp_path / "llama"), "block_size": 16, "max_iters": 2, "eval_interval": 2}
    path = write_config(tmp_path, reference_config="", **options)
    arms = {"random", "influence", "whole", "stacking"}
    left_out = {"random_matched", "unseen", *PARTS_OF_GPT2}
    monkeypatch.setattr(StopRequest, "call", in_process)
    monkeypatch.setattr(measurements, "SEQUENCES", 5)
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: plots.plt.close(figure))
    replicate.main([path, "--arms=" + " ".join(arms | left_out)])
    found = {arm: row for (arm, _), row in read_results(tmp_path / "results").items()}
    assert set(found) == arms | {"reference"}
    table = (tmp_path / "results/table.md").read_text()
    assert all(f"Left out: {arm} (" in table for arm in left_out)
    # the whole reference, trained on, is transformers' model of 4 blocks
    step = checkpoint.find(tmp_path / "out/seed_1/whole/run", prefer="latest")
    assert transformers.AutoModelForCausalLM.from_pretrained(step).config.num_hidden_layers == 4
    assert found["random"]["params"] == found["influence"]["params"] != found["whole"]["params"]
    assert found["reference"]["flops"] == found["whole"]["flops_with_reference"] == "", "nobody knows them"
    shutil.rmtree(tmp_path / "llama")
    shutil.rmtree(tmp_path / "out")
    replicate.main([path, "--arms=" + " ".join(arms | left_out), "--report"])
    assert (tmp_path / "results/table.md").read_text() == table, "the logs say what the reference was"


def test_parts_of_blocks_are_left_out_where_inherit_refuses_them(tmp_path):
    other_models.build("llama").save_pretrained(tmp_path / "llama")
    path = write_config(tmp_path, reference_config="", reference=str(tmp_path / "llama"), arms="random")
    c, names = common_of(path), {field.name for field in dataclasses.fields(Recipe)}
    refused = set()
    for name in set(ARMS) - {"random_matched"}:
        for stage in find_arm(name).stages(c):
            try:
                check_fits(Recipe(**{k: v for k, v in stage.start_options.items() if k in names}), c.config)
            except UserError:
                refused.add(name)
    assert refused == set(PARTS_OF_GPT2)


def test_all_losses_are_measured_on_the_same_tokens(tmp_path):
    path = write_config(tmp_path)
    text = (tmp_path / "c.py").read_text().replace("eval_tokens = 200\n", "")
    (tmp_path / "c.py").write_text(text)
    with open(tmp_path / "reference.py", "a") as f:
        f.write("eval_tokens = 100\n")
    assert "reference.py validates on 100 tokens, the others on" in refusal(replicate.main, [path])


@pytest.mark.slow
def test_smoke_of_every_arm_killed_and_continued(tmp_path):
    """All arms run in processes of their own, are killed together, and go on."""
    data = write_data(tmp_path / "data", train=60_000, val=9000)
    command = [sys.executable, "replicate.py", "config/replicate_smoke.py", f"--dataset={data}"]
    command += [f"--out_dir={tmp_path / 'out'}", f"--results={tmp_path / 'results'}", "--max_iters=20"]
    environment = os.environ | {"PYTHONPATH": ROOT}

    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    rows = f"{tmp_path}/out/**/row.json"  # pathlib's rglob fails where a folder is renamed meanwhile
    while len(glob.glob(rows, recursive=True)) < 6 and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    found = read_results(tmp_path / "results")
    assert {arm for arm, _ in found} == set(ARMS) and len(found) == len(ARMS) + 3
    assert found["rounds", 1]["val_loss"] == found["inheritune", 1]["val_loss"]
