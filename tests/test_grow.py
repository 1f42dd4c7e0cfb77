"""The recipe from end to end on a tiny model, and what it refuses."""

import os
import shutil

import pytest

import grow
from inheritune.base.files import read_json
from inheritune.base.signals import StopRequest
from inheritune.experiments.measurements import validation_loss
from inheritune.models.open_model import open_config
from inheritune.training.command_line import parse
from inheritune.training.logs import loss_curve
from inheritune.training.settings import GrowSettings, TrainSettings
from inheritune.weights import checkpoint
from tests import other_models
from tests.experiments.comparison import REFERENCE, SMALL, in_process
from tests.tiny import contents, write_data

REFERENCE = REFERENCE.replace("max_iters = 12", "max_iters = 30")
RECIPE = f"""{SMALL}
k_start = 1
max_iters = 12
eval_interval = 6
"""


def write_recipe(folder, **changes):
    """A data folder, a reference config and a recipe in `folder`: (the recipe's path, its out_dir)."""
    data = write_data(folder / "data")
    (folder / "reference.py").write_text(REFERENCE)
    out = str(folder / "out")
    lines = {"dataset": data, "out_dir": out, "reference_config": str(folder / "reference.py"), **changes}
    (folder / "recipe.py").write_text(RECIPE + "".join(f"{k} = {v!r}\n" for k, v in lines.items()))
    return str(folder / "recipe.py"), out


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
    return read_json(f"{out}/results.json")


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
        lineage = checkpoint.read_lineage(checkpoint.find(f"{out}/inheritune_0{k}"))
        assert [b["block"] for b in lineage["blocks"]] == list(range(k))
        assert lineage["sources"]["reference"]["name"].endswith(os.path.basename(reference))


def test_run_again_makes_what_is_missing_and_changes_nothing(finished, target):
    recipe, out = finished
    before = {run: contents(f"{out}/{run}") for run in ("reference", "inheritune_03", "random_matched")}
    table = open(f"{out}/results.json").read()
    shutil.rmtree(f"{out}/inheritune_03/step_00000012")
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


def test_onto_takes_as_many_steps_and_any_context(finished, target, tmp_path):
    """... here one shorter than the reference's. What is grown onto what: test_inherit.py."""
    options = {"growth": "onto", "k_start": 2, "k_step": 1, "block_size": 4}
    recipe, out = write_recipe(tmp_path, reference_config="", **options)
    grow.main([recipe, f"--reference={finished[1]}/reference"])
    runs = {(r["arm"], r["n_layer"]): r["tokens"] for r in results(out)["runs"]}
    steps = "as many steps as its blocks had"
    assert runs["random", 3] == runs["inheritune", 2] + runs["inheritune", 3], steps
    lineage = checkpoint.read_lineage(f"{out}/inheritune_03_start")
    assert [b["from"] for b in lineage["blocks"]] == ["onto", "onto", "reference"]
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


def test_dry_run_writes_nothing(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path)
    grow.main([recipe, "--dry_run"])
    shown = capsys.readouterr().out
    assert "1 blocks x 16 for 12 steps" in shown and "3 blocks x 16" in shown and not os.path.exists(out)
