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
from inheritune.experiments.measurements import loss_curve, validation_loss
from inheritune.models.open_model import open_config
from inheritune.training.command_line import parse
from inheritune.training.settings import GrowSettings, TrainSettings
from inheritune.weights import checkpoint, gpt2_format
from tests import other_models
from tests.experiments.comparison import REFERENCE, SMALL
from tests.tiny import ROOT, contents, refusal, write_data

REFERENCE = REFERENCE.replace("max_iters = 12", "max_iters = 30")
RECIPE = f"""{SMALL}
k_start = 1
max_iters = 12
eval_interval = 6
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


@pytest.fixture
def target(monkeypatch):
    """Recipes train in this process, for a loss that no small model reaches: all rounds are made."""
    monkeypatch.setattr(StopRequest, "call", in_process)
    monkeypatch.setattr(grow, "validation_loss", lambda *a: 0.5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(recipe, out_dir) of a recipe that ran to its end, with all its rounds."""
    recipe, out = write_recipe(tmp_path_factory.mktemp("grow"), k_step=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "call", in_process)
        patch.setattr(grow, "validation_loss", lambda *a: 0.5)
        grow.main([recipe])
    return recipe, out


def results(out):
    with open(os.path.join(out, "results.json")) as f:
        return json.load(f)


def test_grows_until_one_block_below_the_reference(finished):
    """The controls take as many steps as the last round, and the compute of the whole pipeline."""
    out = finished[1]
    found = results(out)
    runs = {(r["arm"], r["n_layer"]): r for r in found["runs"]}
    rounds = [("inheritune", k) for k in (1, 2, 3)]
    assert list(runs) == [("reference", 4), *rounds, ("random", 3), ("random_matched", 3)]
    assert found["matched"] is False and found["k"] == 3
    pipeline = sum(runs[key]["flops"] for key in [("reference", 4), *rounds])
    one_step = runs["random", 3]["flops"] / 12
    assert abs(runs["random_matched", 3]["flops"] - pipeline) <= one_step / 2
    assert runs["random", 3]["tokens"] == runs["inheritune", 3]["tokens"] == 12 * 64
    text = open(f"{out}/report.md").read()
    assert "random init, compute of the whole pipeline" in text and "not matched" in text
    assert open(f"{out}/loss.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    assert open_config(checkpoint.find(f"{out}/final")).n_layer == 3


def test_rounds_begin_with_the_references_first_blocks(finished):
    out = finished[1]
    reference = checkpoint.find(f"{out}/reference", prefer="latest")
    for k in (1, 2, 3):
        with open(f"{checkpoint.find(f'{out}/inheritune_0{k}')}/lineage.json") as f:
            lineage = json.load(f)
        assert [b["block"] for b in lineage["blocks"]] == list(range(k))
        assert lineage["sources"]["reference"]["name"].endswith(os.path.basename(reference))


def test_run_again_changes_nothing(finished, target):
    recipe, out = finished
    before = {run: contents(f"{out}/{run}") for run in ("reference", "inheritune_02", "random_matched")}
    table = open(f"{out}/results.json").read()
    grow.main([recipe])
    assert before == {run: contents(f"{out}/{run}") for run in before}
    assert open(f"{out}/results.json").read() == table


def test_measure_is_the_validation_that_training_logs(finished):
    recipe, out = finished
    settings, g, explicit = parse((TrainSettings, GrowSettings), [recipe], "")
    config = grow.plan_recipe(settings, g, explicit).config
    loss = validation_loss(settings, config, checkpoint.find(f"{out}/reference", prefer="latest"))
    assert loss == pytest.approx(loss_curve(f"{out}/reference")[1][-1], rel=1e-6)


def test_stops_at_the_first_round_that_matches(finished, target, tmp_path, monkeypatch):
    """The control takes the steps that were taken, fewer where the small model stopped early."""
    recipe, out = write_recipe(tmp_path, reference_config="", k_start=2, stop_at_val_loss=4.0)
    monkeypatch.setattr(grow, "validation_loss", lambda *a: 50.0)
    grow.main([recipe, f"--reference={finished[1]}/reference"])
    found = {r["arm"]: r for r in results(out)["runs"]}
    assert results(out)["matched"] is True and results(out)["k"] == 2 and len(found) == 4
    assert found["random"]["tokens"] == found["inheritune"]["tokens"] < 12 * 64
    assert found["random_matched"]["tokens"] > 12 * 64, "it does not stop there"


def test_onto_keeps_the_trained_blocks(finished, target, tmp_path):
    recipe, out = write_recipe(tmp_path, reference_config="", growth="onto", k_start=2, k_step=1)
    grow.main([recipe, f"--reference={finished[1]}/reference"])
    runs = {(r["arm"], r["n_layer"]): r["tokens"] for r in results(out)["runs"]}
    steps = "as many steps as its blocks had"
    assert runs["random", 3] == runs["inheritune", 2] + runs["inheritune", 3], steps
    small = gpt2_format.read_weights(checkpoint.find(f"{out}/inheritune_02", prefer="latest"))
    reference = gpt2_format.read_weights(checkpoint.find(f"{finished[1]}/reference", prefer="latest"))
    start = gpt2_format.read_weights(f"{out}/inheritune_03_start")
    for name in start:
        source = reference if ".h.2." in name else small
        assert (start[name][:] == source[name][:]).all(), name


def test_onto_in_a_context_shorter_than_the_references(finished, target, tmp_path):
    recipe, out = write_recipe(
        tmp_path, reference_config="", growth="onto", k_start=2, k_step=1, block_size=4
    )
    grow.main([recipe, f"--reference={finished[1]}/reference"])
    assert open_config(checkpoint.find(f"{out}/final")).block_size == 4


def test_any_decoder_as_the_reference(target, tmp_path):
    """A Llama of 4 blocks: rounds of 1 and 3 blocks in a shorter context, and a control from random init.
    Nobody knows the compute of its training, so there is no control for that."""
    other_models.build("llama").save_pretrained(tmp_path / "llama")
    recipe, out = write_recipe(tmp_path, reference_config="", block_size=8, growth="onto")
    grow.main([recipe, f"--reference={tmp_path / 'llama'}"])
    runs = results(out)["runs"]
    found = [(r["arm"], r["n_layer"]) for r in runs]
    assert found == [("reference", 4), ("inheritune", 1), ("inheritune", 3), ("random", 3)]
    assert runs[0]["flops"] is None
    config = open_config(checkpoint.find(f"{out}/final"))
    assert (config.block_prefix, config.n_layer, config.block_size) == ("model.layers.", 3, 8)
    assert "not matched" in open(f"{out}/report.md").read() and os.path.exists(f"{out}/loss.png")
    said = refusal(grow.main, [recipe, f"--reference={tmp_path / 'llama'}", "--block_size=65"])
    assert "block_size 65 is above the 64 positions" in said


def test_dry_run_writes_nothing(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path)
    grow.main([recipe, "--dry_run"])
    shown = capsys.readouterr().out
    assert "1 blocks x 16 for 12 steps" in shown and "3 blocks x 16" in shown and not os.path.exists(out)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--n_layer=3"], "n_layer is decided by the recipe"),
        (["--teacher=gpt2"], "grow.py trains on the next token alone"),
        (["--reference=gpt2-xl"], "gpt2-xl is trained already: leave out reference_config"),
        (["--reference_config=OTHER"], "trains on data/other, not on"),
    ],
)
def test_refusals(tmp_path, extra, message):
    recipe, out = write_recipe(tmp_path)
    (tmp_path / "other.py").write_text(REFERENCE + "dataset = 'data/other'\n")
    text = "".join(line for line in open(recipe) if not line.startswith("dataset"))
    (tmp_path / "bare.py").write_text(text)  # the recipe's own data would be the reference's, too
    extra = [flag.replace("OTHER", str(tmp_path / "other.py")) for flag in extra]
    assert message in refusal(grow.main, [tmp_path / "bare.py", *extra]) and not os.path.exists(out)


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
