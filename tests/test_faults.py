"""What a run survives: signals, a full disk, damaged checkpoints, a second run in its folder."""

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import train
from inheritune.base.errors import STOP_SIGNALS
from inheritune.base.files import lock_folder, unlock_folder
from inheritune.weights import checkpoint, gpt2_format
from model import GPT
from tests.tiny import SHAPE, arguments, contents, cut, refusal, rows

DROPOUT = {"dropout": 0.2, "keep_last": 9, "log_interval": 2}


@pytest.fixture(scope="session")
def undisturbed(forks, data, tmp_path_factory):
    """(contents of a run with dropout, number of moments at which it could have been killed)."""
    out = str(tmp_path_factory.mktemp("undisturbed") / "out")
    status, moments = forks.train(arguments(data, out, **DROPOUT))
    assert status == 0
    return contents(out), moments


def go_on(forks, data, out, undisturbed):
    """Run the same command; the end must be as if nothing had happened. (A checkpoint written because of a
    signal may be there besides.)"""
    assert forks.train(arguments(data, out, **DROPOUT, resume="auto"))[0] == 0
    found = contents(out)
    assert {name: found.get(name) for name in undisturbed[0]} == undisturbed[0]
    assert not [n for n in os.listdir(out) if n.startswith(".")]


# SIGKILL


@pytest.mark.parametrize("shares", [[0.02], [0.38], [0.55], [0.97], [0.3, 0.24, 0.18]])
def test_a_killed_run_continues_bit_for_bit(forks, data, tmp_path, undisturbed, shares):
    out = tmp_path / "out"
    for share in shares:
        moment = int(1 + share * (undisturbed[1] - 1))
        assert forks.train(arguments(data, out, **DROPOUT, resume="auto"), die=moment) == (-9, None)
        assert all(GPT.from_pretrained(os.path.join(out, s)) for s in checkpoint.list_steps(out))
    go_on(forks, data, out, undisturbed)


# SIGTERM, SIGINT, a scheduler's warning and a closed terminal


@pytest.mark.parametrize(
    "number, share",
    [
        *((signal.SIGTERM, share) for share in (0.05, 0.35, 0.98)),
        *((number, 0.5) for number in (signal.SIGINT, *STOP_SIGNALS[1:])),
    ],
)
def test_a_run_asked_to_end_saves_and_continues_bit_for_bit(
    forks, data, tmp_path, undisturbed, number, share
):
    out, moment = str(tmp_path / "out"), int(1 + share * (undisturbed[1] - 1))
    status, _ = forks.train(arguments(data, out, **DROPOUT, resume="auto"), die=moment, number=number)
    steps = checkpoint.list_steps(out) if os.path.exists(out) else []
    if share > 0.9 and status == 0:  # the last checkpoint was being written: nothing was left to stop
        assert contents(out) == undisturbed[0]
    else:
        assert status == 128 + number
    logged = max((r["step"] for r in rows(out)), default=0) if steps else 0
    assert not steps or int(steps[-1][5:]) >= logged, "nothing that was logged has to be done again"
    go_on(forks, data, out, undisturbed)


def test_a_checkpoint_comes_within_one_step(data, tmp_path, monkeypatch, capsys):
    """Asked in the middle of step 6, whose checkpoint is not due, and of nothing else."""
    out, step = str(tmp_path / "out"), train.train_step

    def asked(run):
        if run.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        step(run)

    monkeypatch.setattr(train, "train_step", asked)
    with pytest.raises(SystemExit) as end:
        train.main(arguments(data, out))
    assert end.value.code == 143 and checkpoint.list_steps(out) == ["step_00000004", "step_00000006"]
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"train.py: SIGTERM: saved {out}/step_00000006 after step 6; add --resume=auto")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("nth", [2, 4])  # where no checkpoint is due; after the last step
def test_a_validation_is_given_up(data, tmp_path, monkeypatch, nth):
    """... and is made again by the run that goes on, as its row was not written."""
    out, mean_loss, calls = tmp_path / "out", train.mean_loss, []
    more = {"save_interval": 6, "keep_last": 9}

    def asked(*arguments):
        calls.append(arguments)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGINT)
        loss = mean_loss(*arguments)
        assert (loss is None) == (len(calls) == nth)
        return loss

    monkeypatch.setattr(train, "mean_loss", asked)
    with pytest.raises(SystemExit) as end:
        train.main(arguments(data, out, **more))
    assert end.value.code == 130 and len(calls) == nth
    monkeypatch.undo()
    train.main(arguments(data, out, **more, resume="auto"))
    train.main(arguments(data, tmp_path / "whole", **more))
    whole = contents(tmp_path / "whole")
    assert {name: contents(out).get(name) for name in whole} == whole


# A checkpoint on its way


def test_training_goes_on_while_a_checkpoint_is_written(plain, data, tmp_path, monkeypatch):
    """... of the step at which it was due; one at a time, the last before the run is over. Here a writing
    ends only when two more steps have begun, or the training is over."""
    events, free = [], threading.Event()
    step, save, settle = train.train_step, checkpoint.write_step, train.wait_for_checkpoint

    def slow(run, weights, optimizer, config, state, *more):
        events.append(("writing", state["step"]))
        while ("step", state["step"] + 1) not in events and not free.is_set():
            time.sleep(0.001)
        save(run, weights, optimizer, config, state, *more)
        events.append(("written", state["step"]))

    def stepping(run):
        events.append(("step", run.state.step))
        step(run)

    def settling(run):
        free.set()
        settle(run)
        free.clear()

    monkeypatch.setattr(checkpoint, "write_step", slow)
    monkeypatch.setattr(train, "train_step", stepping)
    monkeypatch.setattr(train, "wait_for_checkpoint", settling)
    train.main(arguments(data, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(plain)
    for due in (4, 8):
        assert events.index(("step", due + 1)) < events.index(("written", due))
    done = [e for e in events if e[0] != "step"]
    assert done == [(what, due) for due in (4, 8, 12) for what in ("writing", "written")]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(
    plain, data, tmp_path, monkeypatch
):
    """... not only when the next one is due, and its half is gone."""
    out, write_tensors, step, failed = tmp_path / "out", gpt2_format.write_tensors, train.train_step, []

    def full(path, tensors):
        if "step_00000008" in path:
            raise OSError(28, "No space left on device", path)
        return write_tensors(path, tensors)

    def waiting(run):
        if run.state.step == 9:
            concurrent.futures.wait([run.saver.newest])
        step(run)
        failed.append(run.state.step)

    monkeypatch.setattr(gpt2_format, "write_tensors", full)
    monkeypatch.setattr(train, "train_step", waiting)
    message = refusal(train.main, arguments(data, out))
    assert "No space left on device (" in message and "run the same command again" in message
    assert failed[-1] <= 10 and checkpoint.list_steps(out) == ["step_00000004"]
    assert os.readlink(out / "best") == "step_00000004"
    assert not [n for n in os.listdir(out) if n.startswith(".")]
    monkeypatch.undo()
    train.main(arguments(data, out, resume="auto"))
    assert contents(out) == contents(plain)


# A full disk


@pytest.mark.parametrize("limit", [100, 14_000, 60_000])
def test_a_full_disk_is_one_line_and_costs_nothing(forks, data, tmp_path, undisturbed, limit):
    """No file may grow beyond the limit: the log, the weights, the optimizer's file, … fail."""
    out = tmp_path / "out"
    assert forks.train(arguments(data, out, **DROPOUT, resume="auto"), limit=limit)[0] == 1
    assert "File too large" in forks.said and "raise the limit (ulimit -f) and run the same" in forks.said
    assert all(GPT.from_pretrained(os.path.join(out, s)) for s in checkpoint.list_steps(str(out)))
    go_on(forks, data, out, undisturbed)


# root obeys permissions without its capabilities
POWERLESS = """
import ctypes
head, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(head, none) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="root's capabilities are Linux's")
def test_an_unwritable_folder_is_one_line_and_a_read_only_checkpoint_will_do(forks, plain, data, tmp_path):
    ours = shutil.copytree(plain, tmp_path / "run", symlinks=True)
    subprocess.run(["chmod", "-R", "a-w", ours], check=True)
    longer = arguments(data, ours, resume="auto", max_iters=16, lr_decay_iters=12)
    assert forks.train(longer, code=POWERLESS)[0] == 1 and "Permission denied" in forks.said
    shape = dict.fromkeys(SHAPE)
    argv = arguments(data, tmp_path / "new", init_from=ours, max_iters=1, **shape)
    assert forks.train(argv, code=POWERLESS)[0] == 0, forks.printed
    subprocess.run(["chmod", "-R", "u+w", ours], check=True)
    assert contents(ours) == contents(plain)


# Damage


DAMAGE = {
    "no state": lambda f: os.unlink(f / "state.json"),
    "no optimizer": lambda f: os.unlink(f / "optimizer.safetensors"),
    "cut weights": lambda f: os.truncate(f / "model.safetensors", 5000),
    "overwritten optimizer": lambda f: (f / "optimizer.safetensors").write_bytes(b"\xff" * 5000),
    "nothing at all": lambda f: [os.unlink(f / n) for n in os.listdir(f)],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside(plain, data, tmp_path, damage, capsys):
    """--resume=auto names it, goes on from the one before, and ends the same."""
    out = tmp_path / "out"
    shutil.copytree(plain, out, symlinks=True)
    damage(out / "step_00000012")
    train.main(arguments(data, out, resume="auto"))
    said = capsys.readouterr().out
    assert f"{out}/step_00000012 is no whole checkpoint and is set aside: " in said and "step 12/12" in said
    assert contents(out) == contents(plain) and os.path.isdir(out / "step_00000012.damaged")


@pytest.mark.parametrize("link", [None, "gone"])
def test_a_run_folder_may_be_moved_and_lose_its_links(plain, data, tmp_path, link):
    cut(plain, tmp_path / "a", 8)
    os.rename(tmp_path / "a", tmp_path / "b")
    os.unlink(tmp_path / "b/best")
    os.unlink(tmp_path / "b/latest")
    if link:
        os.symlink(link, tmp_path / "b/latest")
    assert checkpoint.find(str(tmp_path / "b"), prefer="latest") == str(tmp_path / "b/step_00000008")
    train.main(arguments(data, tmp_path / "b", resume="auto"))
    assert contents(tmp_path / "b") == contents(plain)


# Two runs, one folder


def test_a_run_holds_its_folder_while_it_trains_and_a_second_one_is_refused(data, tmp_path, monkeypatch):
    out, step, seen = str(tmp_path / "out"), train.train_step, []
    os.makedirs(out)
    lock = lock_folder(out)
    said = refusal(train.main, arguments(data, out))
    cure = "wait for it or stop it, or choose another --out_dir"
    assert said == f"train.py: another process is training in {out}: {cure}"
    assert os.listdir(out) == [".lock"]
    unlock_folder(out, lock)
    monkeypatch.setattr(train, "train_step", lambda run: seen.append(lock_folder(out)) or step(run))
    train.main(arguments(data, out))
    assert seen == [None] * 12
    os.close(lock_folder(out))


def test_a_plan_that_another_run_has_overtaken_is_refused(plain, data, tmp_path, monkeypatch):
    """Between the look at the folder and the lock on it, another run ended there."""
    out, setup = tmp_path / "out", train.Run
    shutil.copytree(plain, out, symlinks=True)

    def late(*arguments):
        shutil.copytree(out / "step_00000012", out / "step_00000016")
        return setup(*arguments)

    monkeypatch.setattr(train, "Run", late)
    said = refusal(train.main, arguments(data, out, resume="auto"))
    assert f"another process has just trained in {out}: run the same command again" in said
    assert open(out / "log.csv").read() == open(os.path.join(plain, "log.csv")).read()
