"""Files are replaced whole or not at all; a folder is locked for one process."""

import errno
import fcntl
import os
import shutil
import socket
import stat
import subprocess
import sys

import pytest

from inheritune.base import files
from inheritune.base.errors import UserError
from tests.tiny import ROOT


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "a.json")
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), files.replacing(path) as f:
        f.write(b"half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (events.append(name), call(*a)))
    files.write_json(tmp_path / "a.json", {})
    assert events == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: None, "does not exist"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.write_text("[1]"), "holds a JSON list where an object is expected; make it again"),
        (lambda path: path.write_text("{"), "it is damaged or not ours: make it again"),
        (lambda path: path.write_bytes(b'{"\xff": 1}'), "is not valid JSON"),
        (lambda path: (path.touch(), os.truncate(path, 10**11)), "is not valid JSON"),
    ],
)
def test_what_is_no_json_file_of_ours_is_refused_by_name(tmp_path, make, said):
    make(tmp_path / "a.json")
    with pytest.raises(UserError) as e:
        files.read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(e.value) and said in str(e.value)


def test_a_folder_that_cannot_be_fsynced_will_do(tmp_path, monkeypatch):
    """CIFS, VirtualBox and WSL refuse it; a file that cannot be fsynced is still an error."""
    fsync, error = os.fsync, errno.EINVAL

    def refuse(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    for error in files.NO_SYNC:
        files.write_json(tmp_path / "a.json", {"error": error})
        assert files.read_json(tmp_path / "a.json") == {"error": error}
    error = errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O"):
        files.write_json(tmp_path / "b.json", {})


def test_a_folder_is_made_where_a_kill_left_one_that_cannot_be_deleted(tmp_path, monkeypatch, capsys):
    (tmp_path / ".a.99999999.tmp").mkdir()
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(denied))
    with files.new_folder(tmp_path / "a"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".a.99999999.tmp", "a"]
    left = f"{tmp_path}/.a.99999999.tmp cannot be deleted (Permission denied); delete it yourself\n"
    assert capsys.readouterr().out == left


def test_a_folder_that_another_process_is_making_stays(tmp_path):
    """... under the same name or a longer one; what a killed process left goes."""
    for left in (f".a.{os.getppid()}.tmp", ".a.b.99999999.tmp", ".a.99999999.tmp"):
        (tmp_path / left).mkdir()
    with files.new_folder(tmp_path / "a"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([f".a.{os.getppid()}.tmp", ".a.b.99999999.tmp", "a"])


def test_a_folder_is_locked_until_its_process_is_gone(tmp_path):
    """... even by SIGKILL, and under another name."""
    lock = files.lock_folder(tmp_path)
    assert files.lock_folder(tmp_path) is None
    files.unlock_folder(tmp_path, lock)
    assert os.listdir(tmp_path) == []
    folder = tmp_path / "a"
    folder.mkdir()
    code = "import time; from inheritune.base import files; "
    code += f"files.lock_folder({str(folder)!r}); print(flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    folder = folder.rename(tmp_path / "b")
    assert files.lock_folder(folder) is None
    holder.kill()
    holder.wait()
    files.unlock_folder(folder, files.lock_folder(folder))


def test_where_locks_stay_on_their_machine_both_runs_are_told(tmp_path, monkeypatch, capsys):
    """As on some network file systems: the other machine's lock is not seen, but its name is."""
    first = files.lock_folder(tmp_path)
    assert files.is_locked_by_us(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    second = files.lock_folder(tmp_path)
    assert "and not unlocked; if that run goes on, stop one of the two" in capsys.readouterr().out
    assert files.is_locked_by_us(tmp_path)
    monkeypatch.undo()
    assert not files.is_locked_by_us(tmp_path)
    files.unlock_folder(tmp_path, first)
    assert (tmp_path / ".lock").read_text().startswith(f"node7 process {os.getpid()}, since 2")
    os.close(second)


def test_a_lock_that_is_given_up_while_another_takes_it_is_one_lock(tmp_path, monkeypatch):
    lock, flock = files.lock_folder(tmp_path), fcntl.flock

    def given_up_first(*arguments):
        files.unlock_folder(tmp_path, lock)
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", given_up_first)
    assert files.lock_folder(tmp_path) is None, "its file is no longer the folder's"
