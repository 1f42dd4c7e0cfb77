"""Files are replaced whole or not at all; a folder is locked for one process.

pytest tests/base/test_files.py
"""

import os
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
        (lambda path: path.write_text('{"a":' * 100_000), "is not valid JSON"),
        (lambda path: path.write_bytes(b'{"\xff": 1}'), "is not valid JSON"),
        (lambda path: (path.touch(), os.truncate(path, 10**11)), "has 100,000,000,000 bytes, too many"),
    ],
)
def test_what_is_no_json_file_of_ours_is_refused_by_name(tmp_path, make, said):
    make(tmp_path / "a.json")
    with pytest.raises(UserError) as e:
        files.read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(e.value) and said in str(e.value)


def test_a_folder_is_locked_until_its_process_is_gone(tmp_path):
    """... even by SIGKILL, and under another name."""
    lock = files.lock_folder(tmp_path)
    assert files.lock_folder(tmp_path) is None
    os.close(lock)
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
    os.close(files.lock_folder(folder))
