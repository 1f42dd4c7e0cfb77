"""A run that goes on differently, ends by itself, or is watched more closely."""

import dataclasses
import os
import shutil
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

import train
from inheritune.base.files import read_json, write_json
from inheritune.training import build_run
from inheritune.training.command_line import parse
from inheritune.training.planning import same_rates
from inheritune.training.schedule import learning_rate
from inheritune.training.settings import SCHEDULE, TrainSettings
from inheritune.weights import checkpoint
from tests.test_reports import Wandb
from tests.tiny import arguments, column, contents, cut, refusal, rows, write_data

OTHERS = {"learning_rate": 0.02, "min_lr": 0.002, "warmup_iters": 2, "schedule": "linear", "max_iters": 16}
OTHERS |= {"lr_decay_iters": 16, "cooldown_iters": None}


# --change


@pytest.mark.parametrize("key", sorted((SCHEDULE | {"max_iters"}) - {"cooldown_iters"}))
def test_a_run_goes_on_with_other_rates_when_asked(plain, data, tmp_path, key):
    """Its steps so far stay; the next one starts from their weights and moments, with the new rate."""
    out, other = cut(plain, tmp_path / "a", 12), {key: OTHERS[key]}
    longer = {"max_iters": 16, "keep_last": 9} | other
    said = refusal(train.main, arguments(data, out, resume="auto", **longer))
    assert "add --change to go on with the new learning rates" in said
    assert ("lr_decay_iters" in said) == (key == "lr_decay_iters"), "nobody gave it"
    argv = arguments(data, out, resume="auto", change=True, **longer)
    train.main(argv)
    assert rows(out)[:12] == rows(plain)[:12]
    settings, _ = parse((TrainSettings,), argv, "")
    rates = [learning_rate(step, settings) for step in range(12, 16)]
    assert column(out, "lr")[12:] == pytest.approx(rates), "of the new settings"
    moments = load_file(out / "step_00000016" / checkpoint.OPTIMIZER)
    assert {int(value) for name, value in moments.items() if name.endswith("/step")} == {16}


def test_rates_of_a_warm_up_that_outlasts_the_decay_are_compared_too():
    before = TrainSettings(warmup_iters=2000, lr_decay_iters=10, min_lr=1e-5)
    after = dataclasses.replace(before, min_lr=1e-4)
    assert same_rates(before, after, 2000), "warm-up does not know min_lr"
    assert not same_rates(before, after, 2001), "the first step after it has that rate"
    assert not same_rates(before, after, 3000) and same_rates(before, before, 3000)


def test_the_change_is_written_down_once(plain, data, tmp_path, capsys):
    """... in state.json and in the card, and the run killed after it ends with the same bytes."""
    options = {"max_iters": 20, "keep_last": 9, "resume": "auto", "change": True}
    out = cut(plain, tmp_path / "a", 12)
    train.main(arguments(data, out, **options))
    changes = ["step 12: max_iters was 12, is 20"]
    assert f"from step 12 with other settings: {changes[0][9:]}" in capsys.readouterr().out
    assert read_json(out / "latest/state.json")["changes"] == changes
    assert f"changes {changes[0]}" in (out / "latest/README.md").read_text()
    whole = contents(out)
    shutil.rmtree(out / "step_00000020")
    train.main(arguments(data, out, **options))
    assert contents(out) == whole and read_json(out / "latest/state.json")["changes"] == changes
    assert "changes" not in (cut(plain, tmp_path / "b", 12) / "latest/README.md").read_text()


def test_the_last_validation_of_a_run_that_is_made_longer_stays(data, tmp_path):
    options = {"eval_interval": 6, "log_interval": 1, "keep_last": 9, "schedule": "wsd"}
    train.main(arguments(data, tmp_path, max_iters=10, **options))
    before = {row["step"]: row["val_loss"] for row in rows(tmp_path)}
    train.main(arguments(data, tmp_path, max_iters=12, resume="auto", change=True, **options))
    after = {row["step"]: row["val_loss"] for row in rows(tmp_path)}
    assert before[10] and before.items() <= after.items()


def test_a_run_without_a_loss_scaler_goes_on_with_one(plain, monkeypatch):
    monkeypatch.setattr(build_run, "load_optimizer", lambda *arguments: None)
    scaler = torch.amp.GradScaler("cpu")  # of float16; the run so far has none
    before, folder = scaler.state_dict(), checkpoint.find(plain, prefer="latest")
    assert build_run.restore(folder, None, None, scaler)[0].step > 0 and scaler.state_dict() == before


# max_hours, stop_after_worse


def test_max_hours_save_and_go_on_to_the_same_bytes(plain, data, tmp_path, capsys):
    """They are over in the sixth step."""
    step, out, timers = train.train_step, tmp_path / "a", []

    class Timer(threading.Timer):
        def start(self):
            timers.append(self)

    def timed(run):
        if run.state.step == 5:
            timers[0].function()
        step(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(threading, "Timer", Timer)
        patch.setattr(train, "train_step", timed)
        train.main(arguments(data, out, max_hours=1.5))
    assert end.value.code == 143 and checkpoint.list_steps(out)[-1] == "step_00000006"
    assert [timer.interval for timer in timers] == [5400]
    said = capsys.readouterr()
    assert "max_hours: 1.5 hours are over" in said.out and "SIGTERM: saved" in said.err
    train.main(arguments(data, out, resume="auto", max_hours=1))
    found, expected = contents(out), contents(plain)
    assert {name: found.get(name) for name in expected} == expected


def test_max_hours_and_restarts_exclude_each_other(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "max-restarts" in refusal(train.main, arguments(data, tmp_path / "a", max_hours=1))


def test_validations_without_a_new_best_end_a_run(data, tmp_path, monkeypatch):
    """... also when it was killed between them. It is done then."""
    losses = {2: 5.0, 4: 4.0, 6: 4.5, 8: 3.9, 10: 4.0, 12: 4.1, 14: 4.2, 16: 1.0}
    monkeypatch.setattr(train, "validate", lambda run: {"val_loss": losses.get(run.state.step, 9.0)})
    options = {"eval_interval": 2, "max_iters": 20, "stop_after_worse": 3, "keep_last": 9}
    train.main(arguments(data, tmp_path / "a", **options))
    assert os.readlink(tmp_path / "a/best") == "step_00000008"
    assert os.readlink(tmp_path / "a/latest") == "step_00000014"
    whole = contents(tmp_path / "a")
    for step in ("step_00000012", "step_00000014"):
        shutil.rmtree(tmp_path / "a" / step)
    train.main(arguments(data, tmp_path / "a", **options, resume="auto"))
    assert {**whole, **contents(tmp_path / "a")} == whole
    state = read_json(tmp_path / "a/latest/state.json")
    assert state["since_best"] == 2, "as each state, that before the validation at its step"

    # stopped by it and continued, a run counts a validation once
    train.main(arguments(data, tmp_path / "c", **options))
    more = options | {"stop_after_worse": 4}
    train.main(arguments(data, tmp_path / "c", **more, resume="auto"))
    assert os.readlink(tmp_path / "c/best") == "step_00000016"

    # between two validations a run has no loss to end with: it goes on to the next one
    options |= {"save_interval": 1, "keep_last": 99}
    train.main(arguments(data, tmp_path / "b", **options | {"stop_after_worse": None}))
    for step in range(6, 21):
        shutil.rmtree(tmp_path / f"b/step_{step:08}")
    state = read_json(tmp_path / "b/step_00000005/state.json")
    write_json(tmp_path / "b/step_00000005/state.json", state | {"since_best": 3})
    train.main(arguments(data, tmp_path / "b", **options, resume="auto"))
    assert os.readlink(tmp_path / "b/latest") == "step_00000006"


# also_validate, W&B


def test_a_run_goes_on_with_and_without_a_second_validation(data, tmp_path):
    for name, first, then in (("a", data, ""), ("b", "", data)):
        for also, steps in ((first, 4), (then, 8)):
            options = {"also_validate": also, "max_iters": steps, "lr_decay_iters": 8, "resume": "auto"}
            train.main(arguments(data, tmp_path / name, **options))
        losses = [row["also_val_loss"] for row in rows(tmp_path / name) if row["val_loss"]]
        assert all(losses[:1]) == bool(first) and bool(losses[-1]) == bool(then)


def test_a_second_validation_changes_nothing_and_is_the_loss_of_its_data(plain, data, tmp_path, capsys):
    other = write_data(tmp_path / "other", val=300, high=50)
    train.main(arguments(data, tmp_path / "a", also_validate=other))
    assert contents(tmp_path / "a") | {"log.csv": ""} == contents(plain) | {"log.csv": ""}
    also = [row.pop("also_val_loss") for row in rows(tmp_path / "a")]
    kept = [{k: v for k, v in row.items() if k != "also_val_loss"} for row in rows(tmp_path / "a")]
    assert kept == rows(plain)
    train.main(arguments(other, tmp_path / "b", init_from=f"{plain}/latest", max_iters=1))
    assert [step for step, loss in enumerate(also) if loss is not None] == [0, 4, 8, 12]
    assert also[12] == column(tmp_path / "b", "val_loss")[0]
    assert f"also_val {also[12]:.4f}" in capsys.readouterr().out
    meta = read_json(f"{other}/meta.json")
    write_json(f"{other}/meta.json", meta | {"tokenizer": meta["tokenizer"] | {"eot": 0}})
    said = refusal(train.main, arguments(data, tmp_path / "c", also_validate=other))
    assert f"{other} (also_validate) was not tokenised as {data}" in said


def test_wandb_is_told_what_its_environment_says(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    options = {"log_to": "wandb", "max_iters": 1}
    train.main(arguments(data, tmp_path / "a", **options))
    for name in ("PROJECT", "NAME", "ENTITY"):
        monkeypatch.setenv(f"WANDB_{name}", name)
    train.main(arguments(data, tmp_path / "b", **options))
    named = [{key: run.get(key) for key in ("project", "name", "entity")} for run in module.runs]
    assert named[0] == {"project": "nanoInheritune", "name": "a", "entity": None}
    assert named[1] == {"project": "PROJECT", "name": "NAME", "entity": None}, "W&B reads the last itself"
