"""A prepare script that is killed and started again writes what an undisturbed one writes, bit for bit."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import prepare
import prepare_fineweb
import prepare_owt
from inheritune.base.errors import UserError
from inheritune.data import sources, writer
from inheritune.data.reader import read_meta
from tests.assets import english
from tests.test_prepare import check_meta, same, write_tables
from tests.tiny import ROOT

# The script with small batches and parts, so that a small corpus has many of both.
RUN = "from inheritune.data import text_files, writer; import sys, prepare; "
RUN += "writer.BATCH = text_files.PIECE = 5_000; writer.PART = 10_000; prepare.main(sys.argv[1:])"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def write_inputs(folder):
    """0.65 MB of text in two files."""
    folder.mkdir(exist_ok=True)
    whole = "".join(english())[:600_000]
    (folder / "a.txt").write_text(whole)
    (folder / "b.txt").write_text(whole[:50_000])


def command(folder, out, num_proc):
    flags = ["--tokenizer", "bytes", "--out", str(out), "--num_proc", str(num_proc)]
    return [sys.executable, "-c", RUN, str(folder / "a.txt"), str(folder / "b.txt"), *flags]


def begin(command):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def tokens_recorded(out):
    try:
        return sum(entry["tokens"] for entry in json.loads((out / "progress.json").read_text())["files"])
    except FileNotFoundError:
        return 0


def test_kill(tmp_path, inputs):
    """By real signals, with two threads. (Each script at each moment: below, and the torture.)"""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    prepare.main([*command(inputs, undisturbed, 1)[3:]])
    total = sum(split["tokens"] for split in check_meta(undisturbed)["splits"].values())
    recorded = 0
    for share, number, status in ((0.1, signal.SIGTERM, 143), (0.6, signal.SIGKILL, -signal.SIGKILL)):
        run = begin(command(inputs, out, 2))
        while tokens_recorded(out) < share * total and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
        assert run.returncode == status and not (out / "meta.json").exists()
        assert "Traceback" not in said and ("run the same command again" in said) == (status == 143)
        assert total > tokens_recorded(out) >= max(recorded, share * total), "nothing recorded is lost"
        recorded = tokens_recorded(out)
    run = begin(command(inputs, out, 2))
    assert "going on after" in run.communicate(timeout=120)[1] and run.returncode == 0
    assert same(undisturbed, out)


class Killed(BaseException):
    pass


FILES = ("fsync", "replace", "unlink", "makedirs")


@pytest.mark.parametrize("script", [prepare, prepare_owt, prepare_fineweb])
def test_killed_at_every_file_operation(tmp_path, monkeypatch, script):
    """As if killed before the first, the second, … operation that changes a file; nothing works after it."""
    monkeypatch.setattr(writer, "BATCH", 100)
    monkeypatch.setattr(writer, "PART", 300)
    write_tables(tmp_path, [str(i) * 20 * i for i in range(8)])
    argv = [str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--num_proc", "1"]
    argv = argv if script is prepare else ["--data_files", *argv]
    argv += ["--shard_tokens", "200"] if script is prepare_fineweb else []
    script.main([*argv, "--out", str(tmp_path / "undisturbed")])

    real = {name: getattr(os, name) for name in FILES}
    left = 0

    def mortal(name):
        def operation(*args, **kwargs):
            nonlocal left
            is_lock = str(args[0]).endswith(".lock")  # a real kill unlocks it
            left -= not is_lock
            if left < 0 and not is_lock:
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
            script.main([*argv, "--out", str(out)])  # finished, whatever the kill left in it
            assert same(tmp_path / "undisturbed", out), f"killed at operation {n}"
    assert 15 < n < 999


def stop_after(monkeypatch, pieces):
    """Let every source fail after so many pieces."""
    read_pieces = sources.read_pieces

    def stops(*arguments):
        yield from itertools.islice(read_pieces(*arguments), pieces)
        raise UserError("stop here")

    monkeypatch.setattr(sources, "read_pieces", stops)


def test_what_was_begun_with_other_settings_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PART", 70)
    write_tables(tmp_path, [str(i) * i for i in range(60)])
    argv = ["--data_files", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--num_proc", "1"]
    out, argv70 = tmp_path / "out", [*argv, "--shard_tokens", "70"]
    with monkeypatch.context() as m:
        stop_after(m, 50)
        with pytest.raises(SystemExit, match="stop here"):
            prepare_fineweb.main([*argv70, "--out", str(out)])
    assert tokens_recorded(out) > 0 and (out / "train_000005.bin").exists()
    with pytest.raises(UserError, match="is unfinished: run its preparation"):
        read_meta(out)  # although the finished shards look like a nanoGPT folder
    with pytest.raises(SystemExit, match="is begun, but with shard_tokens 70, not 700; choose another --out"):
        prepare_fineweb.main([*argv, "--out", str(out), "--shard_tokens", "700"])

    # the same text at another path, touched, is the same input
    os.rename(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    os.utime(tmp_path / "b.jsonl", ns=(0, 0))
    argv70[1] = str(tmp_path / "b.jsonl")
    prepare_fineweb.main([*argv70, "--out", str(out)])
    prepare_fineweb.main([*argv70, "--out", str(tmp_path / "fresh")])
    assert same(tmp_path / "fresh", out)


@pytest.mark.parametrize("script", [prepare, prepare_fineweb])
def test_a_failure_keeps_what_is_finished_and_only_that(tmp_path, monkeypatch, script):
    monkeypatch.setattr(writer, "PART", 70)
    monkeypatch.setattr(writer, "BATCH", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 50)
    argv = [str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--num_proc", "1"]
    argv = argv if script is prepare else ["--data_files", *argv, "--shard_tokens", "70"]
    script.main([*argv, "--out", str(tmp_path / "undisturbed")])
    for pieces, kept in ((10, False), (40, True)):
        with monkeypatch.context() as m, pytest.raises(SystemExit, match="stop here"):
            stop_after(m, pieces)
            script.main([*argv, "--out", str(tmp_path / "out")])
        assert (tmp_path / "out").exists() == kept
    assert tokens_recorded(tmp_path / "out") >= 140
    script.main([*argv, "--out", str(tmp_path / "out")])
    assert same(tmp_path / "undisturbed", tmp_path / "out")


def test_lost_part(tmp_path, monkeypatch):
    """A record of tokens that are not there is refused, not padded with zeros."""
    monkeypatch.setattr(writer, "PART", 10)
    monkeypatch.setattr(writer, "BATCH", 20)
    out = tmp_path / "out"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 50)
    argv = [str(tmp_path / "a.jsonl"), "--out", str(out), "--tokenizer", "bytes", "--num_proc", "1"]
    with monkeypatch.context() as m, pytest.raises(SystemExit, match="stop here"):
        stop_after(m, 40)
        prepare.main(argv)
    os.truncate(out / "train_000001.part", 3)
    with pytest.raises(SystemExit, match=r"train_000001\.part is missing or not as long as it was"):
        prepare.main(argv)
