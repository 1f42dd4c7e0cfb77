"""Checkpoint and run folders: whole or absent, exact, and found by any of their names."""

import errno
import os
import re
import shutil

import pytest
import torch

from inheritune.base.cpus import usable_cpus
from inheritune.base.errors import UserError
from inheritune.data.tokenizer import tokenizer_files
from inheritune.training.optimizer import make_optimizer, snapshot
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint
from tests.tiny import same_weights, tiny_model


def trained(seed=0, steps=3):
    model = tiny_model(seed)
    optimizer = make_optimizer(model, TrainSettings(), torch.device("cpu"))
    for _ in range(steps):
        model(*torch.randint(257, (2, 2, 8)).unbind(0)).backward()
        optimizer.step()
    return model, optimizer


def save(run, step, model=None, optimizer=None):
    if model is None:
        model, optimizer = trained(step, steps=1)
    os.makedirs(run, exist_ok=True)
    parameters, state = snapshot(model, optimizer, {})
    weights, files = model.config.arrange(parameters), tokenizer_files(model.config)
    content = model.config.content()
    checkpoint.write_step(str(run), weights, state, content, {"step": step}, {"blocks": []}, files)


def everything(folder):
    """Every path under a folder, links with where they point."""
    return {path: path.is_symlink() and os.readlink(path) for path in folder.rglob("*")}


def test_a_checkpoint_holds_these_files(tmp_path):
    save(tmp_path, 7)
    names = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "lineage.json"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(tmp_path / "step_00000007")) == names
    assert os.readlink(tmp_path / "latest") == "step_00000007"
    assert all(os.stat(tmp_path / "step_00000007" / n).st_mode & 0o444 == 0o444 for n in names)


@pytest.mark.parametrize(
    "where", ["checkpoint.write_tensors", "gpt2_format.write_json", "os.fsync", "os.rename"]
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch, where, error):
    save(tmp_path, 1)
    before = everything(tmp_path)

    monkeypatch.setattr(where if where[:3] == "os." else f"inheritune.weights.{where}", raising(error))
    with pytest.raises(type(error)):
        save(tmp_path, 2)
    assert everything(tmp_path) == before


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_link_changes_in_one_step(tmp_path, monkeypatch):
    save(tmp_path, 1)
    checkpoint.link(f"{tmp_path}/best", "step_00000001")
    monkeypatch.setattr(os, "replace", raising(OSError("cut")))
    with pytest.raises(OSError, match="cut"):
        checkpoint.link(f"{tmp_path}/best", "step_00000002")
    assert os.readlink(tmp_path / "best") == "step_00000001"


def test_a_copy_without_links_is_named(tmp_path):
    (tmp_path / "best").mkdir()
    with pytest.raises(UserError, match="was a link to one"):
        checkpoint.link(f"{tmp_path}/best", "step_00000001")
    assert os.listdir(tmp_path) == ["best"]


def test_where_there_are_no_links_a_file_takes_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "symlink", raising(OSError(errno.EPROTO, "no links here")))
    for step in (1, 2):
        save(tmp_path, step)
        assert (tmp_path / "latest").read_text() == f"step_0000000{step}"
    checkpoint.link(f"{tmp_path}/best", "step_00000001")
    assert checkpoint.find(str(tmp_path)) == f"{tmp_path}/step_00000001"
    assert checkpoint.find(f"{tmp_path}/best") == f"{tmp_path}/step_00000001"


def test_what_is_old_and_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", raising(PermissionError(errno.EACCES, "Permission denied")))
    checkpoint.prune(str(tmp_path), 1, None)
    assert checkpoint.list_steps(str(tmp_path)) == ["step_00000002"]
    checkpoint.sweep(str(tmp_path))
    said = "cannot be deleted (Permission denied); delete it yourself"
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [said, said]


def test_a_folder_that_another_process_has_taken_is_left_alone(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".lock").write_text("node7 process 1, since 2026-01-01 00:00:00")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="another process has taken"):
        save(tmp_path, 2)
    assert everything(tmp_path) == before


def test_names_that_are_no_folder_are_asked_of_the_hub_if_they_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "download", lambda name, weights: f"hub:{name}:{weights}")
    assert checkpoint.find("gpt2-large") == "hub:gpt2-large:True"
    assert checkpoint.find("who/what.v2", weights=False) == "hub:who/what.v2:False"
    for name in ("./gone", "a/b/c", "a b", ""):
        with pytest.raises(UserError, match="no folder"):
            checkpoint.find(name)


def test_everything_is_on_disk_before_the_name_appears(tmp_path, monkeypatch):
    """Each file and the folder are fsynced before the rename, the parent after it; then the link alike."""
    events = []

    def note(name, event):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: events.append(event(*args)) or call(*args))

    note("fsync", lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
    note("rename", lambda a, b: "RENAME")
    note("symlink", lambda a, b: f"LINK {a}")
    note("replace", lambda a, b: f"REPLACE {os.path.basename(b)}")
    run = tmp_path / "run"
    save(run, 1)
    at = events.index("RENAME")
    before = {e.removeprefix(".").split(f".{os.getpid()}.tmp")[0].removesuffix(".tmp") for e in events[:at]}
    files_inside = set(os.listdir(run / "step_00000001"))
    assert before >= files_inside | {"step_00000001"}
    assert events[at:] == ["RENAME", "run", "LINK step_00000001", "REPLACE latest", "run"]


def test_what_a_kill_left_is_swept_and_the_rest_is_not(tmp_path):
    save(tmp_path, 1)
    before = everything(tmp_path)
    os.mkdir(tmp_path / ".step_00000002.tmp")
    (tmp_path / ".step_00000002.tmp/model.safetensors").write_text("half")
    (tmp_path / ".log.csv.tmp").write_text("half")
    os.symlink("step_00000001", tmp_path / ".latest.tmp")
    assert checkpoint.list_steps(str(tmp_path)) == ["step_00000001"]
    checkpoint.sweep(str(tmp_path))
    assert everything(tmp_path) == before
    for name in (".hidden", "notes.tmp"):
        (tmp_path / name).write_text("not ours")
    checkpoint.sweep(str(tmp_path))
    assert (tmp_path / ".hidden").exists() and (tmp_path / "notes.tmp").exists()


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (5, 10, 15, 20, 100_000_000):
        save(tmp_path, step)
    checkpoint.prune(str(tmp_path), 2, best_step=10)
    assert checkpoint.list_steps(str(tmp_path)) == ["step_00000010", "step_00000020", "step_100000000"]
    checkpoint.prune(str(tmp_path), 1, best_step=None)
    assert checkpoint.list_steps(str(tmp_path)) == ["step_100000000"]
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


def test_find_takes_a_run_folder_a_checkpoint_or_a_link(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save(run, step)
    assert checkpoint.find(str(run)) == str(run / "step_00000003"), "no best yet: the newest"
    checkpoint.link(f"{run}/best", "step_00000002")
    assert checkpoint.find(str(run)) == checkpoint.find(f"{run}/") == str(run / "step_00000002")
    assert checkpoint.find(str(run), prefer="latest") == str(run / "step_00000003")
    assert checkpoint.find(str(run / "step_00000001")) == str(run / "step_00000001")
    assert os.path.samefile(checkpoint.find(str(run / "best")), run / "step_00000002")
    shutil.rmtree(run / "step_00000002")  # the best one was deleted by hand: its link hangs
    assert capsys.readouterr().err == ""
    assert checkpoint.find(str(run)) == str(run / "step_00000003")
    gone = f"{run}/best points at a checkpoint that is gone; taking the newest, step_00000003\n"
    assert capsys.readouterr().err == gone
    with pytest.raises(UserError, match="best is a link to step_00000002, which is gone"):
        checkpoint.find(f"{run}/best")


def test_a_snapshot_is_a_copy_and_the_next_one_takes_its_memory():
    model, optimizer = trained()
    copies, other = {}, {}
    snapshot(model, optimizer, copies)
    before = {name: t.clone() for name, t in copies.items()}
    where = {name: t.data_ptr() for name, t in copies.items()}
    model(*torch.randint(257, (2, 2, 8)).unbind(0)).backward()
    optimizer.step()
    assert same_weights(copies, before)
    weights, state = snapshot(model, optimizer, copies)
    assert (weights | state).keys() == copies.keys()
    assert {name: t.data_ptr() for name, t in copies.items()} == where
    snapshot(model, optimizer, other)
    assert same_weights(copies, other) and not same_weights(copies, before)


def test_the_environment_names_the_revision_or_says_that_it_is_unknown(tmp_path, monkeypatch):
    checkpoint.environment.cache_clear()
    found = checkpoint.environment()
    assert found["versions"]["torch"] == torch.__version__ and found["hardware"]["cpus"] == usable_cpus()
    assert found["git"] == "unknown" or re.search(r"[0-9a-f]{12}(-dirty)?$", found["git"])
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    checkpoint.environment.cache_clear()
    assert checkpoint.environment()["git"] == "unknown"
    checkpoint.environment.cache_clear()
