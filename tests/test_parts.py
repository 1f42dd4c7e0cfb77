"""A preparation shared among workers and joined is a single machine's, and whatever is killed goes on.

pytest tests/test_parts.py
"""

import base64
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare_fineweb
import prepare_owt
from inheritune.base.errors import UserError
from inheritune.base.files import read_json, sha256
from inheritune.data import encode, parts
from inheritune.data import sources as corpus
from inheritune.data import writer as bins
from inheritune.data.reader import Tokens
from inheritune.data.tokenizer import load_tokenizer
from tests.assets import english, gpt2_ranks
from tests.test_prepare import ROOT, check_meta, write_tables
from tests.test_prepare_kill import FILES, RUN, Killed, tokens_recorded
from tests.tiny import refusal

SCRIPTS = {"prepare_owt": prepare_owt, "prepare_fineweb": prepare_fineweb}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A long text between two tables, a hub folder of three files, and, for the tests of kills, larger tables."""
    folder = tmp_path_factory.mktemp("inputs")
    whole = "".join(english())
    (folder / "mixed").mkdir()
    texts = [whole[i : i + 750] for i in range(0, 60_000, 750)] + ["", " ", ""]
    write_tables(folder / "mixed", texts)
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        os.unlink(folder / "mixed" / name)
    os.rename(folder / "mixed" / "a.parquet", folder / "mixed" / "c.parquet")
    lines = (folder / "mixed" / "a.jsonl").read_text()
    (folder / "mixed" / "a.jsonl").write_text("\n \n" + lines)  # blank lines are no documents
    (folder / "mixed" / "b.txt").write_text(whole[:30_000])
    (folder / "hub").mkdir()
    for i in range(3):
        table = pyarrow.table({"text": texts[i * len(texts) // 3 : (i + 1) * len(texts) // 3]})
        pyarrow.parquet.write_table(table, folder / "hub" / f"{i}.parquet", row_group_size=10)
    write_tables(folder, [whole[i : i + 750] for i in range(0, 400_000, 750)])
    return folder


def flags(script, out):
    shards = ["--shard_tokens", "9000"] if script == "prepare_fineweb" else []
    return ["--num_proc", "1", "--out", str(out), *shards]


def stream(out, split):
    """All tokens of a split, as the reader of training sees them."""
    tokens = Tokens(str(out), split)
    return tokens.read(0, len(tokens))


def check_joined(single, out, script, n):
    """Does `out`, joined from n parts, equal what one machine made in `single`, and hold nothing else?"""
    one, meta = check_meta(single), check_meta(out)
    for split in ("train", "val"):
        assert np.array_equal(stream(single, split), stream(out, split)), split
        assert {k: v for k, v in one["splits"][split].items() if k != "shards"}.items() <= meta["splits"][split].items()
    assert meta["made"] == one["made"] | {"arguments": one["made"]["arguments"] | {"workers": n}}
    if script == "prepare_fineweb":
        assert sha256(single / "val_000000.bin") == sha256(out / "val_000000.bin")


@pytest.mark.parametrize("script, source, tokenizer, n", [
    ("prepare_owt", "mixed", "bytes", 5),
    ("prepare_owt", "mixed", "gpt2", 3),
    ("prepare_owt", "hub", "bytes", 2),
    ("prepare_fineweb", "mixed", "bytes", 7),
    ("prepare_fineweb", "hub", "bytes", 3),
])  # fmt: skip
def test_joined_parts_are_a_single_machines(tmp_path, inputs, script, source, tokenizer, n, monkeypatch, capsys):
    """In any order, finished ones started again, before and after the join."""
    monkeypatch.setattr(corpus, "PIECE", 5000)
    monkeypatch.setattr(encode, "BATCH", 5000)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    main = SCRIPTS[script].main
    path = ["--dataset" if source == "hub" else "--data_files", str(inputs / source)]
    path += ["--name", "default"] if (script, source) == ("prepare_fineweb", "hub") else []
    path += ["--tokenizer", gpt2_ranks() if tokenizer == "gpt2" else tokenizer]
    main([*path, *flags(script, tmp_path / "single")])

    out = tmp_path / "out"
    order = random.Random(n).sample(range(n), n)
    for i in [*order, order[0]]:
        main([*path, *flags(script, out), "--worker", f"{i}/{n}"])
    assert f"part_{order[0]}_of_{n} is already finished" in capsys.readouterr().out
    for _ in range(2):
        main(["--out", str(out), "--join", str(n)])
        check_joined(tmp_path / "single", out, script, n)
    capsys.readouterr()
    main([*path, *flags(script, out), "--worker", f"0/{n}"])
    assert "out is already finished" in capsys.readouterr().out
    check_joined(tmp_path / "single", out, script, n)
    assert "finished, but with workers" in refusal(main, [*path, *flags(script, out)])


def test_more_workers_than_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    common = ["--data_files", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes"]
    prepare_owt.main([*common, *flags("prepare_owt", tmp_path / "single")])
    for i in range(4):
        prepare_owt.main([*common, *flags("prepare_owt", tmp_path / "out"), "--worker", f"{i}/4"])
    prepare_owt.main(["--out", str(tmp_path / "out"), "--join", "4"])
    check_joined(tmp_path / "single", tmp_path / "out", "prepare_owt", 4)


@pytest.mark.parametrize("script, source", [("prepare_owt", "a.parquet"), ("prepare_fineweb", "a.jsonl.gz")])
def test_killed_workers_go_on(tmp_path, inputs, script, source):
    """Three real processes at once, each killed in the middle of its part and started again."""
    path = ["--data_files", str(inputs / source), "--tokenizer", "bytes"]
    SCRIPTS[script].main([*path, *flags(script, tmp_path / "single")])
    out = tmp_path / "out"

    def start(i):
        command = [sys.executable, "-c", RUN.format(script), *path, *flags(script, out), "--worker", f"{i}/3"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    running, killed = [start(i) for i in range(3)], 0
    for i, run in enumerate(running):
        while tokens_recorded(out / f"part_{i}_of_3") < 40_000 and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        killed += run.returncode == -signal.SIGKILL
    assert killed
    said = [run.communicate(timeout=60) for run in [start(i) for i in range(3)]]
    assert sum("going on after" in err for _, err in said) == killed, said
    SCRIPTS[script].main(["--out", str(out), "--join", "3"])
    check_joined(tmp_path / "single", out, script, 3)


def test_renames_are_on_disk_before_the_folder_is_finished(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 9)
    for i in range(2):
        worker(prepare_owt, i, 2, str(tmp_path / "a.jsonl"), str(tmp_path / "out"))
    events = []
    for name in ("move", "sync_folder", "write_meta"):
        real = getattr(parts, name)
        monkeypatch.setattr(parts, name, lambda *a, name=name, real=real: (events.append(name), real(*a))[1])
    prepare_owt.main(["--out", str(tmp_path / "out"), "--join", "2"])
    assert events == ["move", "sync_folder", "write_meta"]


def test_join_killed_at_every_file_operation(tmp_path, monkeypatch):
    """As if killed before the first, the second, ... operation that changes a file; the same command goes on."""
    monkeypatch.setattr(encode, "BATCH", 100)
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{"a b " * 40}"}}\n' * 12)
    ranks = tmp_path / "bytes.tiktoken"  # a tokenizer that is a file in the folder
    ranks.write_bytes(b"".join(base64.b64encode(bytes((b,))) + b" %d\n" % b for b in range(256)))
    common = ["--data_files", str(tmp_path / "a.jsonl"), "--tokenizer", str(ranks), "--num_proc", "1"]
    common += ["--shard_tokens", "200"]
    prepare_fineweb.main([*common, "--out", str(tmp_path / "single")])
    for i in range(3):
        prepare_fineweb.main([*common, "--out", str(tmp_path / "parts"), "--worker", f"{i}/3"])

    left, real = 0, {name: getattr(os, name) for name in (*FILES, "rmdir")}

    def mortal(name, *args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return real[name](*args, **kwargs)

    for name in real:
        monkeypatch.setattr(os, name, functools.partial(mortal, name))
    for n in range(1000):
        left, out = sys.maxsize, tmp_path / f"out{n}"
        shutil.copytree(tmp_path / "parts", out)
        left = n
        try:
            prepare_fineweb.main(["--out", str(out), "--join", "3"])
            break
        except Killed:
            left = sys.maxsize
            if not (out / "meta.json").exists() and (out / "tokenizer.tiktoken").exists():
                again = [*common, "--out", str(out), "--worker", "1/3"]
                assert "is being joined; run --join 3 to go on" in refusal(prepare_fineweb.main, again)
                with pytest.raises(UserError, match="is unfinished: run its preparation, or the join"):
                    Tokens(str(out), "train")
            prepare_fineweb.main(["--out", str(out), "--join", "3"])
            check_joined(tmp_path / "single", out, "prepare_fineweb", 3)
    assert 15 < n < 999


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with `a.jsonl` and `out`, which holds two of three parts of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "a {i}", "other": "b"}}\n' for i in range(9)))
    for i in (0, 2):
        worker(prepare_owt, i)
    return tmp_path


def worker(script, i, n=3, file="a.jsonl", out="out", *more):
    script.main(command(i, n, file, out, *more))


def command(i, n=3, file="a.jsonl", out="out", *more):
    return f"--data_files {file} --out {out} --tokenizer bytes --num_proc 1 --worker {i}/{n}".split() + list(more)


def test_missing_parts(place, monkeypatch):
    join = ["--out", "out", "--join", "3"]
    assert "out lacks 1 of 3 parts: run --worker 1/3 to the end first" in refusal(prepare_owt.main, join)
    monkeypatch.setattr(bins, "write_meta", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker(prepare_owt, 1)
    assert os.path.isdir("out/part_1_of_3")
    assert "run --worker 1/3 to the end" in refusal(prepare_owt.main, join), "an unfinished part is none"
    assert "holds parts of 3 workers, not 2" in refusal(prepare_owt.main, ["--out", "out", "--join", "2"])
    monkeypatch.undo()
    os.chdir(place)
    worker(prepare_owt, 1)
    os.unlink("out/part_2_of_3/train.bin")
    assert "part_2_of_3/train.bin is missing or not as long" in refusal(prepare_owt.main, join)
    assert sorted(os.listdir("out")) == [f"part_{i}_of_3" for i in range(3)]


@pytest.mark.parametrize("more, key", [
    (["--text_column", "other"], "text_column 'other', not 'text'"),
    (["--tokenizer", "gpt2"], "tokenizer"),
    (["--data_files", "copy.jsonl"], "sources ['copy.jsonl'], not ['a.jsonl']"),
])  # fmt: skip
def test_parts_that_differ(place, more, key):
    shutil.copy("a.jsonl", "copy.jsonl")
    worker(prepare_owt, 1, 3, "a.jsonl", "out", *(gpt2_ranks() if flag == "gpt2" else flag for flag in more))
    said = refusal(prepare_owt.main, ["--out", "out", "--join", "3"])
    assert f"out/part_1_of_3 was made with {key}" in said and "delete the wrong part" in said


def test_parts_of_other_scripts_places_and_versions(place):
    worker(prepare_owt, 1)
    join = ["--out", "out", "--join", "3"]
    assert "script 'prepare_owt.py', not 'prepare_fineweb.py'" in refusal(prepare_fineweb.main, join)
    os.rename("out/part_1_of_3", "out/kept")
    assert "out holds kept, which is no worker's" in refusal(prepare_owt.main, join)
    shutil.copytree("out/part_2_of_3", "out/part_1_of_3")
    shutil.rmtree("out/kept")
    assert "part_1_of_3 was made with worker '2/3', not '1/3'" in refusal(prepare_owt.main, join)
    meta = read_json("out/part_1_of_3/meta.json")
    meta["made"]["arguments"]["worker"] = "1/3"
    meta["made"]["versions"]["tiktoken"] = "0.1"
    bins.write_json("out/part_1_of_3/meta.json", meta)
    assert "part_1_of_3 was made with versions" in refusal(prepare_owt.main, join)


def test_a_hostile_or_damaged_part(place):
    """Its meta.json names a file outside, or is none of ours: refused, and nothing is moved."""
    worker(prepare_owt, 1)
    join, before = ["--out", "out", "--join", "3"], sorted(map(str, place.rglob("*")))
    meta = read_json("out/part_1_of_3/meta.json")
    meta["splits"]["train"]["shards"][0].update(file="../../a.jsonl", tokens=os.path.getsize("a.jsonl") // 2)
    bins.write_json("out/part_1_of_3/meta.json", meta)
    assert "out/part_1_of_3/a.jsonl is missing" in refusal(prepare_owt.main, join)
    for damage in ({"splits": {}}, {"splits": 3}, {"dtype": "word"}, {"made": []}):
        bins.write_json("out/part_1_of_3/meta.json", meta | damage)
        assert "part_1_of_3/meta.json was not written by this script" in refusal(prepare_owt.main, join)
    assert sorted(map(str, place.rglob("*"))) == before


def test_folders_that_are_not_for_parts(place):
    for argv, said in (
        (command(0, 2), "out holds parts of 3 workers, not 2"),
        (command(0, out="a.jsonl"), "a.jsonl"),
        (command(0, out="."), "holds a.jsonl, which is no worker's"),
        (["--out", "gone", "--join", "3"], "no folder gone"),
    ):
        assert said in refusal(prepare_owt.main, argv)
    alone = [*command(0)[:-2]]
    assert "out is not empty" in refusal(prepare_owt.main, alone)
    prepare_owt.main([*alone, "--out", "whole"])
    assert "whole is finished, but with workers None, not 3" in refusal(prepare_owt.main, command(0, out="whole"))
    assert "workers None, not 3" in refusal(prepare_owt.main, ["--out", "whole", "--join", "3"])
    with bins.unfinished("out/part_1_of_3", "prepare_owt.py", {}, load_tokenizer("bytes")):
        assert "part_1_of_3 is being written" in refusal(prepare_owt.main, command(1))
    lock = parts.lock_folder("out")
    assert "being joined by another run" in refusal(prepare_owt.main, ["--out", "out", "--join", "3"])
    os.close(lock)


def test_a_first_part_without_a_whole_validation_shard(place):
    fineweb = ["--shard_tokens", "20"]
    said = refusal(prepare_fineweb.main, [*command(0, 3, "a.jsonl", "new"), *fineweb])
    assert "no text is left for train; give more text, or ask for smaller shards or fewer workers" in said
    assert not os.path.exists("new/part_0_of_3/meta.json")
    said = refusal(prepare_fineweb.main, [*command(0, 3, "a.jsonl", "new"), *fineweb, "--max_tokens", "30"])
    assert "--max_tokens counts from" in said


def test_a_worker_that_fails_leaves_nothing(place):
    (place / "bad.jsonl").write_text('{"text": "one"}\n' * 5 + "{nonsense\n")
    assert "bad.jsonl, line 6: not JSON" in refusal(prepare_owt.main, command(2, 3, "bad.jsonl", "new/er"))
    assert not os.path.exists("new")


def test_too_many_workers_for_the_hubs_files(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    argv = ["--dataset", str(inputs / "hub"), "--name", "default", "--tokenizer", "bytes", "--worker", "0/4"]
    said = refusal(prepare_fineweb.main, [*argv, "--out", str(tmp_path / "out")])
    assert "has 3 files to share, too few for 4 workers" in said


def test_a_part_is_read_from_its_row_group_on(tmp_path, monkeypatch):
    """The text before a worker's part is not read where the file lets it be skipped."""
    texts = ["".join(english())[i * 100 : i * 100 + 100] for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    groups = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(table, *args, row_groups, **kwargs):
        groups.extend(row_groups)
        return real(table, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    argv = ["--data_files", str(tmp_path / "a.parquet"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    prepare_owt.main([*argv, "--worker", "1/2"])
    assert groups == [0, 5, 6, 7, 8, 9], "the first of all for its column, then what is this worker's"
