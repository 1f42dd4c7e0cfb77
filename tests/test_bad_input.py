"""Mistakes: each is answered by one clear line (or one list of them) and a non-zero exit, and leaves nothing
behind.

pytest tests/test_bad_input.py
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import inherit
import train
from inheritune.data.tokenizer import bytes_tokenizer
from tests.tiny import ROOT, SHAPE, TOKENIZER, arguments, hf_state, refusal, write_checkpoint, write_data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all sorts of things to point at; scripts run in it."""
    here = tmp_path_factory.mktemp("place")
    make_place(here)
    return here


def make_place(here):
    """Good things and bad ones, named for what is wrong with them."""
    write_data(here / "data")
    write_data(here / "short-val", val=5)
    write_data(here / "short-train", train=8)
    write_data(here / "other-tokenizer", tokenizer=TOKENIZER | {"name": "gpt2"})
    write_data(here / "cut")
    os.truncate(here / "cut/train.bin", 1001)
    write_data(here / "text-bin", meta=False)
    (here / "text-bin/train.bin").write_text("a text of an odd number of bytes\n")
    write_data(here / "damaged")
    (here / "damaged/meta.json").write_text("{")
    write_data(here / "no-val")
    os.unlink(here / "no-val/val.bin")
    write_data(here / "nan-meta")
    change_json(here / "nan-meta/meta.json", dtype="float64")
    write_data(here / "climbing")
    shards = {"train": {"shards": [{"file": "../data/train.bin", "tokens": 9}]}}
    change_json(here / "climbing/meta.json", splits=shards)
    write_data(here / "fifo")
    os.unlink(here / "fifo/train.bin")
    os.mkfifo(here / "fifo/train.bin")
    os.mkdir(here / "empty")

    model = write_checkpoint(here / "ref")
    write_checkpoint(here / "untokenized", tokenizer="", vocab_size=100, n_vocab=100, eot=0)
    write_checkpoint(here / "other-vocabulary", vocab_size=256, n_vocab=256, eot=255)
    write_checkpoint(here / "short-teacher", block_size=4)
    write_checkpoint(here / "cut-ckpt")
    os.truncate(here / "cut-ckpt/model.safetensors", 3000)
    write_checkpoint(here / "llama")
    (here / "llama/config.json").write_text(json.dumps({"model_type": "llama"}))
    write_checkpoint(here / "run/step_00000004")
    (here / "run/log.csv").write_text("")
    write_checkpoint(here / "stateless/step_00000004")
    write_checkpoint(here / "pickled")
    os.rename(here / "pickled/model.safetensors", here / "pickled/pytorch_model.bin")
    for name, tensors in (
        ("untied", {"lm_head.weight": torch.zeros(320, 16)}),
        ("extra-tensor", {"transformer.h.0.attn.c_attn.lora": torch.zeros(2)}),
        ("nan-weights", {"transformer.wte.weight": torch.full((320, 16), float("nan"))}),
    ):
        write_checkpoint(here / name)
        save_file(hf_state(model) | tensors, here / name / "model.safetensors")
    write_checkpoint(here / "sharded")
    os.unlink(here / "sharded/model.safetensors")
    index = '{"weight_map": {"a": "../ref/model.safetensors"}}'
    (here / "sharded/model.safetensors.index.json").write_text(index)
    write_checkpoint(here / "deep-json")
    (here / "deep-json/config.json").write_text("[" * 100_000)
    write_checkpoint(here / "huge-header")
    (here / "huge-header/model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")

    (here / "file").write_text("text")
    (here / "ckpt.pt").write_text("text")
    (here / "typo.py").write_text("n_layer = 2\nlerning_rate = 1\n")
    (here / "code.py").write_text("import os\nos.mkdir('mark')\n")
    (here / "grow.py").write_text("k_start = 2\n")
    (here / "binary.py").write_bytes(bytes(range(256)))
    (here / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (here / "bad.jsonl").write_text('{"text": "one"}\nnot json\n')
    (here / "not-a.parquet").write_text("text")
    (here / "not-a.pdf").write_text("text")
    (here / "utf-16.txt").write_bytes("text".encode("utf-16-le"))
    (here / "headless.csv").write_text("one,two\nthree,four\n")
    (here / "numbers.json").write_text("[1, 2]")
    write_data(here / "characters", meta=False)
    (here / "characters/meta.pkl").write_bytes(b"")
    (here / "empty-not").mkdir()
    (here / "bare-tokenizer").mkdir()
    (here / "bare-tokenizer/tokenizer.json").write_bytes(bytes_tokenizer())
    (here / "empty-not/something").write_text("text")
    for name, without in (("base.py", ()), ("inherited.py", SHAPE)):
        flags = [flag[2:].split("=") for flag in arguments("data", "new-out")]
        lines = [f"{k} = {v if v[0].isdigit() else repr(v)}\n" for k, v in flags if k not in without]
        (here / name).write_text("".join(lines))
    train.main(arguments(here / "data", here / "finished", max_iters=4))


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def everything(folder):
    return {os.path.join(d, n) for d, folders, names in os.walk(folder) for n in folders + names}


def read_cases():
    """[(command as a list, the lines it answers)] of bad_input.txt."""
    with open(os.path.join(os.path.dirname(__file__), "bad_input.txt"), encoding="utf-8") as f:
        blocks = re.findall(r"^\$ (.*)\n((?:.+\n?)+)", f.read(), re.MULTILINE)
    return [(shlex.split(command), answer.rstrip("\n")) for command, answer in blocks]


CASES = read_cases()


def fits(said, expected):
    """Whether a message is the expected one, in which … stands for anything on the same line."""
    return re.fullmatch("[^\n]*".join(map(re.escape, expected.split("…"))), said)


def test_there_are_enough_cases():
    scripts = {command[0] for command, _ in CASES}
    assert (
        len(CASES) >= 120
        and len({tuple(command) for command, _ in CASES}) == len(CASES)
        and len(scripts) == 10
    )


@pytest.mark.parametrize("command, expected", CASES, ids=[" ".join(command) for command, _ in CASES])
def test_answer(command, expected, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = everything(place)
    said = refusal(importlib.import_module(command[0].removesuffix(".py")).main, command[1:])
    assert fits(said, expected), said
    lines = said.splitlines()
    if len(lines) > 1:
        assert f"{len(lines) - 1} problems:" in lines[0] and all(line.startswith("  ") for line in lines[1:])
    assert all(len(line) < 420 for line in lines)
    assert everything(place) == before
    assert "Traceback" not in capfd.readouterr().err  # (a bar may have been begun)


@pytest.mark.slow
def test_answers_of_processes(place):
    """Some of them as a user meets them."""
    some = CASES[:: len(CASES) // 9]
    running = [
        subprocess.Popen(
            [sys.executable, os.path.join(ROOT, command[0]), *command[1:]],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, _ in some
    ]
    for process, (_, expected) in zip(running, some, strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and out == "" and fits(err.rstrip("\n"), expected), err
    assert not (place / "new-out").exists()


def test_a_run_that_failed_before_its_first_row_is_no_run(tmp_path):
    """Ids above the vocabulary show only when they are read; mended, the same command line works."""
    data = write_data(tmp_path / "data", high=300)
    argv = arguments(data, tmp_path / "out", max_iters=1)
    assert "above the 257 ids of its tokenizer 'bytes'" in refusal(train.main, argv)
    write_data(data)
    train.main(argv)


def test_a_bug_still_shows_its_traceback(place, monkeypatch):
    """Only mistakes become one line."""
    monkeypatch.setattr(inherit, "check_flags", lambda folder: 1 / 0)
    monkeypatch.chdir(place)
    with pytest.raises(ZeroDivisionError):
        inherit.main(["--ckpt=ref", "--layers=1", "--out=new-out"])
