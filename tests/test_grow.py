"""The recipe from end to end on a tiny model, and what it refuses. python -m pytest tests/test_grow.py"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import grow
import train
from inheritune.base.signals import StopRequest
from inheritune.experiments.measurements import loss_curve, measure
from inheritune.models.open_model import open_config
from inheritune.training.command_line import parse
from inheritune.training.settings import GrowSettings, TrainSettings
from inheritune.weights import checkpoint, gpt2_format
from model import GPTConfig
from tests import other_models
from tests.tiny import ROOT, contents, refusal, write_checkpoint, write_data

REFERENCE = """
n_layer = 4
n_head = 2
n_embd = 16
block_size = 8
batch_tokens = 64
batch_size = 8
max_iters = 30
eval_interval = 10
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 3
"""
RECIPE = """
k_start = 1
batch_tokens = 64
batch_size = 8
max_iters = 12
eval_interval = 6
eval_tokens = 200
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 3
threads = 1
device = "cpu"
"""


def write_recipe(folder, **changes):
    """A data folder, a reference config and a recipe in `folder`; returns the recipe's path and its
    out_dir."""
    data = write_data(folder / "data")
    (folder / "reference.py").write_text(REFERENCE)
    out = str(folder / "out")
    lines = {"dataset": data, "out_dir": out, "reference_config": str(folder / "reference.py"), **changes}
    (folder / "recipe.py").write_text(RECIPE + "".join(f"{k} = {v!r}\n" for k, v in lines.items()))
    return str(folder / "recipe.py"), out


def in_process(request, command):
    """StopRequest.call for train.py, without the process."""
    train.main(command[2:])
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A recipe that ran to its end, in this process, with a target no small model reaches: all rounds are
    made."""
    folder = tmp_path_factory.mktemp("grow")
    recipe, out = write_recipe(folder, k_step=1)
    patch = pytest.MonkeyPatch()
    patch.setattr(StopRequest, "call", in_process)
    patch.setattr(grow, "measure", lambda *a: 0.5)
    grow.main([recipe])
    patch.undo()
    return recipe, out


def results(out):
    with open(os.path.join(out, "results.json")) as f:
        return json.load(f)


def test_grows_until_one_block_below_the_reference(finished):
    _, out = finished
    found = results(out)
    arms = [(r["arm"], r["n_layer"]) for r in found["runs"]]
    assert arms == [
        ("reference", 4),
        *(("inheritune", k) for k in (1, 2, 3)),
        ("random", 3),
        ("random_matched", 3),
    ]
    assert found["matched"] is False and found["k"] == 3
    assert {"arm", "n_layer", "params", "tokens", "flops", "val_loss"} <= set(found["runs"][0])


def test_matched_control_spends_what_the_pipeline_spent(finished):
    runs = {(r["arm"], r["n_layer"]): r for r in results(finished[1])["runs"]}
    pipeline = sum(r["flops"] for (arm, _), r in runs.items() if arm in ("reference", "inheritune"))
    one_step = runs["random", 3]["flops"] / 12
    assert abs(runs["random_matched", 3]["flops"] - pipeline) <= one_step / 2
    assert runs["random", 3]["tokens"] == runs["inheritune", 3]["tokens"] == 12 * 64


def test_rounds_begin_with_the_references_first_blocks(finished):
    out = finished[1]
    reference = checkpoint.find(f"{out}/reference", prefer="latest")
    for k in (1, 2, 3):
        with open(f"{checkpoint.find(f'{out}/inheritune_0{k}')}/lineage.json") as f:
            lineage = json.load(f)
        assert [b["block"] for b in lineage["blocks"]] == list(range(k))
        assert lineage["sources"]["reference"]["name"].endswith(os.path.basename(reference))


def test_report_figure_and_final_link(finished):
    out = finished[1]
    text = open(f"{out}/report.md").read()
    assert "random init, compute of the whole pipeline" in text and "not matched" in text
    assert open(f"{out}/loss.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    assert GPTConfig.from_folder(checkpoint.find(f"{out}/final")).n_layer == 3


def test_run_again_changes_nothing(finished, monkeypatch):
    recipe, out = finished
    before = {run: contents(f"{out}/{run}") for run in ("reference", "inheritune_02", "random_matched")}
    table = open(f"{out}/results.json").read()
    monkeypatch.setattr(StopRequest, "call", in_process)
    monkeypatch.setattr(grow, "measure", lambda *a: 0.5)
    grow.main([recipe])
    assert before == {run: contents(f"{out}/{run}") for run in before}
    assert open(f"{out}/results.json").read() == table


def test_measure_is_the_validation_that_training_logs(finished):
    recipe, out = finished
    settings, g, explicit = parse((TrainSettings, GrowSettings), [recipe], "")
    config = grow.plan_recipe(settings, g, explicit).config
    loss = measure(settings, config, checkpoint.find(f"{out}/reference", prefer="latest"))
    assert loss == pytest.approx(loss_curve(f"{out}/reference")[1][-1], rel=1e-6)


def test_stops_at_the_first_round_that_matches(tmp_path, monkeypatch):
    recipe, out = write_recipe(tmp_path, control=False)
    monkeypatch.setattr(StopRequest, "call", in_process)
    monkeypatch.setattr(grow, "measure", lambda *a: 50.0)
    grow.main([recipe])
    assert [r["arm"] for r in results(out)["runs"]] == ["reference", "inheritune"]
    assert results(out)["matched"] is True and results(out)["k"] == 1


def test_the_control_takes_the_steps_that_were_taken(tmp_path, monkeypatch):
    """Fewer where the small model stopped early."""
    recipe, out = write_recipe(tmp_path, k_start=3, stop_at_val_loss=4.0)
    monkeypatch.setattr(StopRequest, "call", in_process)
    grow.main([recipe])
    found = {r["arm"]: r for r in results(out)["runs"]}
    assert found["random"]["tokens"] == found["inheritune"]["tokens"] < 12 * 64
    assert found["random_matched"]["tokens"] > 12 * 64, "it does not stop there"


def test_onto_keeps_the_trained_blocks(tmp_path, monkeypatch):
    recipe, out = write_recipe(tmp_path, growth="onto", k_start=2, k_step=1)
    monkeypatch.setattr(StopRequest, "call", in_process)
    monkeypatch.setattr(grow, "measure", lambda *a: 0.5)
    grow.main([recipe])
    runs = {(r["arm"], r["n_layer"]): r["tokens"] for r in results(out)["runs"]}
    assert runs["random", 3] == runs["inheritune", 2] + runs["inheritune", 3], (
        "as many steps as its blocks had"
    )
    small = gpt2_format.read_weights(checkpoint.find(f"{out}/inheritune_02", prefer="latest"))
    reference = gpt2_format.read_weights(checkpoint.find(f"{out}/reference", prefer="latest"))
    start = gpt2_format.read_weights(f"{out}/inheritune_03_start")
    for name in start:
        source = reference if ".h.2." in name else small
        assert (start[name][:] == source[name][:]).all(), name


def test_reference_without_known_compute_has_no_matched_control(tmp_path, monkeypatch):
    recipe, out = write_recipe(tmp_path, reference_config="")
    write_checkpoint(tmp_path / "given", n_layer=3)
    monkeypatch.setattr(StopRequest, "call", in_process)
    grow.main([recipe, f"--reference={tmp_path / 'given'}"])
    runs = results(out)["runs"]
    assert [r["arm"] for r in runs][-1] == "random" and runs[0]["flops"] is None


def test_the_references_data_is_the_recipes(tmp_path, capsys):
    recipe, _ = write_recipe(tmp_path)
    lines = open(recipe).read().splitlines()
    (tmp_path / "bare.py").write_text("\n".join(x for x in lines if not x.startswith("dataset")))
    (tmp_path / "reference.py").write_text(REFERENCE + "dataset = 'data/other'\n")
    said = refusal(grow.main, [tmp_path / "bare.py", "--dry_run"])
    assert "trains on data/other, not on data/openwebtext: set dataset" in said
    grow.main([recipe, "--dry_run"])
    assert "first round" in capsys.readouterr().out, "the reference takes the recipe's"


def test_dry_run_writes_nothing(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path)
    grow.main([recipe, "--dry_run"])
    assert "1 then 3 blocks" in capsys.readouterr().out and not os.path.exists(out)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--k_start=4"], "k_start 4 must be at least 1 and below the reference's 4 blocks"),
        (["--k_start=0"], "--k_start must be at least 1"),
        (["--n_layer=3"], "n_layer is decided by the recipe"),
        (["--reference_config="], "there is no reference"),
        (["--reference_config=nowhere.py"], "no config file 'nowhere.py'"),
        (["--reference=gpt2-xl"], "gpt2-xl is trained already: leave out reference_config"),
        (["--growth=sideways"], "must be one of reinherit, onto"),
        (["--k_stop=3"], "did you mean --k_step"),
    ],
)
def test_refusals(tmp_path, extra, message):
    recipe, out = write_recipe(tmp_path)
    assert message in refusal(grow.main, [recipe, *extra])
    assert not os.path.exists(out)


@pytest.mark.slow
def test_killed_recipe_goes_on_to_the_same_end(tmp_path):
    """SIGKILL of the whole process group at random moments, then the same command: the same bytes
    everywhere."""
    outs = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        recipe, out = write_recipe(tmp_path / name, k_start=2)
        outs.append(out)
        command = [sys.executable, os.path.join(ROOT, "grow.py"), recipe]
        rng = random.Random(4)
        for _ in range(3 if name == "killed" else 0):
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
            time.sleep(rng.uniform(6, 16))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for run in ("reference", "inheritune_02", "random", "random_matched"):
        assert contents(f"{outs[0]}/{run}") == contents(f"{outs[1]}/{run}"), run
    assert results(outs[0]) == results(outs[1])


@pytest.mark.parametrize("growth", ["reinherit", "onto"])
def test_any_decoder_as_the_reference(tmp_path, monkeypatch, growth):
    """A Llama of 4 blocks: rounds of 1 and 3 blocks in a shorter context, and a control from random init."""
    other_models.build("llama").save_pretrained(tmp_path / "llama")
    recipe, out = write_recipe(tmp_path, reference_config="", block_size=8, growth=growth)
    monkeypatch.setattr(StopRequest, "call", in_process)
    monkeypatch.setattr(grow, "measure", lambda *a: 0.5)
    grow.main([recipe, f"--reference={tmp_path / 'llama'}"])
    found = [(r["arm"], r["n_layer"]) for r in results(out)["runs"]]
    assert found == [("reference", 4), ("inheritune", 1), ("inheritune", 3), ("random", 3)]
    config = open_config(checkpoint.find(f"{out}/final"))
    assert (config.block_prefix, config.n_layer, config.block_size) == ("model.layers.", 3, 8)
    assert "not matched" in open(f"{out}/report.md").read() and os.path.exists(f"{out}/loss.png")
    said = refusal(grow.main, [recipe, f"--reference={tmp_path / 'llama'}", "--block_size=65"])
    assert "block_size 65 is above the 64 positions" in said
