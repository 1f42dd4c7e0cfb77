"""A prepare script that is killed and started again writes what an undisturbed one writes, bit for bit.

pytest tests/test_prepare_kill.py
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import prepare
import prepare_fineweb
import prepare_owt
from inheritune.base.errors import UserError
from inheritune.base.files import read_json
from inheritune.data import encode
from inheritune.data import sources as corpus
from inheritune.data import writer as bins
from inheritune.data.reader import read_meta
from tests.assets import english
from tests.test_prepare import ROOT, check_meta, same, write_tables

# The script as it is, but with small batches and a record after each, so that a small corpus has many of both.
RUN = (
    "from inheritune.data import encode, sources, writer; import sys, {0}; "
    "encode.BATCH = sources.PIECE = 10_000; writer.RECORD_EVERY = 0; "
    "{0}.main(sys.argv[1:])"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def write_inputs(folder):
    """0.6 MB of text in 800 documents as tables, and in two files."""
    folder.mkdir(exist_ok=True)
    whole = "".join(english())[:600_000]
    write_tables(folder, [whole[i : i + 750] for i in range(0, len(whole), 750)])
    (folder / "a.txt").write_text(whole)
    (folder / "b.txt").write_text(whole[:50_000])


def command(script, folder, out, num_proc):
    flags = ["--tokenizer", "bytes", "--out", str(out), "--num_proc", str(num_proc)]
    files = {
        "prepare": [str(folder / "a.txt"), str(folder / "b.txt")],
        "prepare_owt": ["--data_files", str(folder / "a.parquet")],
        "prepare_fineweb": ["--data_files", str(folder / "a.jsonl.gz"), "--shard_tokens", "25000"],
    }
    return [sys.executable, "-c", RUN.format(script), *files[script], *flags]


def tokens_recorded(out):
    try:
        streams = json.loads((out / "progress.json").read_text())["streams"]
    except (FileNotFoundError, KeyError):
        return 0
    return sum(shard["tokens"] for shards in streams.values() for shard in shards)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(child) for child in f.read().split()]


def gone(pids):
    """Are all these processes gone within ten seconds?"""

    def alive(pid):
        try:
            with open(f"/proc/{pid}/stat") as f:
                return f.read().rpartition(")")[2].split()[0] != "Z"  # where nobody reaps orphans, they stay as Z
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


@pytest.mark.parametrize("script, num_proc", [("prepare", 1), ("prepare_owt", 2), ("prepare_fineweb", 2)])
def test_kill(tmp_path, inputs, script, num_proc):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    subprocess.run(command(script, inputs, undisturbed, 1), cwd=ROOT, check=True, capture_output=True, timeout=120)
    meta = check_meta(undisturbed)
    total = sum(split["tokens"] for split in meta["splits"].values())

    draw = random.Random(f"{script} {num_proc}")
    in_the_middle, recorded, workers = 0, 0, []
    for share in sorted(draw.uniform(0.05, 0.9) for _ in range(3)):
        run = subprocess.Popen(
            command(script, inputs, out, num_proc), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while tokens_recorded(out) < share * total and run.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01))
        workers += children(run.pid) if sys.platform == "linux" and run.poll() is None else []
        run.send_signal(signal.SIGKILL)
        in_the_middle += run.wait() == -signal.SIGKILL
        assert tokens_recorded(out) >= recorded, "nothing that was recorded is lost"
        recorded = tokens_recorded(out)
        assert not (out / "meta.json").exists() or not in_the_middle
    assert in_the_middle == 3 and 0 < recorded < total

    done = subprocess.run(
        command(script, inputs, out, num_proc), cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    assert "going on after" in done.stderr
    assert same(undisturbed, out)

    assert gone(workers), "workers outlived their parent"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_workers(tmp_path, inputs, number):
    for attempt in range(5):  # on a busy machine the run may have ended before this process comes to signal it
        out = tmp_path / str(attempt)
        run = subprocess.Popen(
            command("prepare", inputs, out, 2), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while tokens_recorded(out) < 50_000 and run.poll() is None:
            time.sleep(0.001)
        workers = children(run.pid) if sys.platform == "linux" else []
        run.send_signal(number)
        _, said = run.communicate(timeout=30)
        if run.returncode:
            break
    assert run.returncode == 128 + number and "run the same command again" in said and "Traceback" not in said
    assert gone(workers)


class Killed(BaseException):
    pass


FILES = ("fsync", "replace", "truncate", "unlink", "makedirs")


@pytest.mark.parametrize("script", [prepare_owt, prepare_fineweb])
def test_killed_at_every_file_operation(tmp_path, monkeypatch, script):
    """As if killed before the first, the second, ... operation that changes a file; nothing works afterwards."""
    monkeypatch.setattr(encode, "BATCH", 100)
    monkeypatch.setattr(bins, "RECORD_EVERY", 0)
    write_tables(tmp_path, [str(i) * 5 * i for i in range(14)])
    argv = ["--data_files", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--num_proc", "1"]
    argv += ["--shard_tokens", "200"] if script is prepare_fineweb else []
    script.main([*argv, "--out", str(tmp_path / "undisturbed")])

    real = {name: getattr(os, name) for name in FILES}
    left = 0

    def mortal(name):
        def operation(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real[name](*args, **kwargs)

        return operation

    for name in FILES:
        monkeypatch.setattr(os, name, mortal(name))
    for n in range(1000):
        out = tmp_path / f"out{n}"
        left = n
        try:
            script.main([*argv, "--out", str(out)])
            break
        except Killed:
            left = sys.maxsize
            script.main([*argv, "--out", str(out)])
            script.main([*argv, "--out", str(out)])  # a finished folder is finished, whatever the kill left in it
            assert same(tmp_path / "undisturbed", out), f"killed at operation {n}"
    assert 50 < n < 999


def test_changed_settings_start_afresh(tmp_path, monkeypatch, capsys):
    """What was made from another input, in other shards, does not get into the result."""
    monkeypatch.setattr(encode, "BATCH", 100)
    monkeypatch.setattr(bins, "RECORD_EVERY", 0)
    write_tables(tmp_path, [str(i) * i for i in range(60)])
    argv = ["--data_files", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--num_proc", "1"]
    out = tmp_path / "out"

    def stops(*arguments):
        yield from itertools.islice(corpus.read_files(*arguments), 50)
        raise UserError("stop here")

    monkeypatch.setattr(prepare_fineweb, "read_files", stops)
    with pytest.raises(SystemExit, match="stop here"):
        prepare_fineweb.main([*argv, "--out", str(out), "--shard_tokens", "70"])
    assert tokens_recorded(out) > 0 and (out / "train_000005.bin").exists()
    with pytest.raises(UserError, match="is unfinished: run its preparation"):
        read_meta(out)  # although the finished shards look like a nanoGPT folder
    monkeypatch.undo()
    prepare_fineweb.main([*argv, "--out", str(out), "--shard_tokens", "700"])
    assert "other settings; starting afresh" in capsys.readouterr().err
    prepare_fineweb.main([*argv, "--out", str(tmp_path / "fresh"), "--shard_tokens", "700"])
    assert same(tmp_path / "fresh", out)


def test_lost_partial_file(tmp_path, monkeypatch):
    """A record of tokens that are not there is refused, not padded with zeros."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 5)
    argv = [str(tmp_path / "a.jsonl"), "--out", str(out), "--tokenizer", "bytes", "--num_proc", "1"]
    monkeypatch.setattr(bins, "finish", lambda *_: (_ for _ in ()).throw(UserError("stop here")))
    with pytest.raises(SystemExit, match="stop here"):
        prepare.main(argv)
    monkeypatch.undo()
    assert read_json(out / "progress.json")["documents"] == 5
    os.truncate(out / "train.bin", 3)
    with pytest.raises(SystemExit, match=r"train\.bin is missing or too short"):
        prepare.main(argv)
