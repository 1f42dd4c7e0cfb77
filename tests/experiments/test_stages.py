"""Runs of train.py: their failures, curves and clocks."""

import dataclasses
import shutil
import weakref

import pytest
import torch

from inheritune.base.errors import UserError
from inheritune.base.files import write_json
from inheritune.experiments import measurements
from inheritune.experiments.measurements import cost_of_training, first_reach, wall_seconds
from inheritune.experiments.stages import Stage, make_start, run_stage
from inheritune.training.settings import TrainSettings
from model import GPTConfig
from tests.tiny import tiny_config, write_checkpoint, write_data


def test_first_reach_counts_earlier_stages(tmp_path):
    def stage(name, n_layer, losses):
        run, lines = tmp_path / name, [f"{5 * i},{x}\n" for i, x in enumerate(losses)]
        run.mkdir()
        (run / "log.csv").write_text("step,val_loss\n" + "".join(lines))
        return Stage(str(run), GPTConfig(n_layer=n_layer), {"max_iters": 10, "batch_tokens": 1})

    a, b = stage("a", 1, [9, 8, 7]), stage("b", 2, [7, "", 5])
    (tmp_path / "b/log.csv").open("a").write("15,4\n")
    found = first_reach([a, b], 5)
    assert found["reached_step"] == 20 and found["reached_layer_steps"] == 10 + 20
    assert found["reached_flops"] == 10 * a.flops_per_step + 10 * b.flops_per_step
    assert first_reach([a, b], 8)["reached_step"] == 5
    assert set(first_reach([a, b], 3).values()) == {None}


def test_wall_seconds_add_up_over_interruptions(tmp_path):
    lines = ["0,0,0", "5,10,1", "10,20,2", "15,4,0.5", "20,8,1"]  # continued once behind step 10
    (tmp_path / "timing.csv").write_text("step,train_s,val_s\n" + "\n".join(lines) + "\n")
    assert wall_seconds(str(tmp_path)) == 22 + 9


@pytest.mark.parametrize("quiet", [False, True])
def test_failed_stage_is_one_line(tmp_path, quiet):
    class Failing:
        def call(self, command, stdout=None, stderr=None):
            if stdout:  # torchrun frames what train.py says
                stdout.write("train.py: val has 5 tokens\n" + "=" * 60 + "\n")
            return 1

    stage = Stage(str(tmp_path / "x"), tiny_config(), {"max_iters": 1, "batch_tokens": 1024})
    (tmp_path / "x.txt").write_text("train.py: an older failure\n")
    with pytest.raises(UserError) as error:
        run_stage(stage, Failing(), quiet)
    why = f"train.py: val has 5 tokens; see {stage.run}.txt" if quiet else "see above"
    again = "" if quiet else "; run the same command again to go on"  # train.py has said what to do
    assert str(error.value) == f"training {stage.run} did not finish ({why}){again}"
    if quiet:
        Failing.call = lambda self, command, stdout, stderr: stdout.write("Killed\n")
        with pytest.raises(UserError, match=r"\(Killed; see"):
            run_stage(stage, Failing(), quiet)


def test_a_start_made_from_another_model_or_with_other_options_is_refused(tmp_path):
    folder = write_checkpoint(str(tmp_path / "ckpt"), n_layer=4)
    small = Stage(str(tmp_path / "x"), folder.config, {}, {"ckpt": str(tmp_path / "ckpt"), "layers": 2})
    make_start(small)
    make_start(small)
    deeper = dataclasses.replace(small, start_options=small.start_options | {"layers": 3})
    with pytest.raises(UserError, match="x_start was made with other options or from another model"):
        make_start(deeper)
    shutil.rmtree(tmp_path / "ckpt")
    write_checkpoint(str(tmp_path / "ckpt"), n_layer=4, seed=2)
    with pytest.raises(UserError, match="from another model"):
        make_start(small)


def test_the_cost_of_a_model_that_did_not_start_from_scratch_is_unknown(tmp_path):
    config = tiny_config()
    assert cost_of_training(str(tmp_path), config) == (None, None)
    state = {"step": 3, "tokens": 30, "bad_steps": 0, "bad_in_a_row": 0, "row": {}}
    for settings, known in (
        ({"init_from": "scratch", "teacher": ""}, (30 * config.flops_per_token, 3 * config.n_layer)),
        ({"init_from": "small", "teacher": ""}, (None, None)),
        ({"init_from": "scratch", "teacher": "large"}, (None, None)),
    ):
        write_json(str(tmp_path / "state.json"), state | {"settings": settings})
        assert cost_of_training(str(tmp_path), config) == known


def test_measured_models_are_gone_before_memory_is_given_back(tmp_path, monkeypatch):
    """The next training is another process on the same GPU."""
    folder, data = str(tmp_path / "ckpt"), write_data(tmp_path / "data")
    config = write_checkpoint(folder).config
    settings = TrainSettings(dataset=data, eval_tokens=100, device="cpu")
    models, load, alive = [], measurements.load_model, []

    def remember(name):
        model = load(name)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(measurements, "load_model", remember)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append([m for m in models if m()]))
    measurements.validation_loss(settings, config, folder)
    measurements.max_ranks(settings, lambda: measurements.load_model(folder))
    assert len(models) == 2 and alive == [[], []]


def test_a_reference_is_measured_compiled_where_training_is(tmp_path, monkeypatch):
    folder, data = str(tmp_path / "ckpt"), write_data(tmp_path / "data")
    config, compiled = write_checkpoint(folder).config, []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    for setting in (None, False, True):
        settings = TrainSettings(dataset=data, eval_tokens=100, device="cpu", compile=setting)
        measurements.validation_loss(settings, config, folder)
        assert len(compiled) == (setting is True)
