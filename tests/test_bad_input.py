"""Mistakes: each is answered by one clear line (or a list of them), and leaves nothing behind."""

import importlib
import os
import re
import shlex

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

import inherit
import train
from inheritune.data.tokenizer import bytes_tokenizer
from tests import other_models, tiny
from tests.experiments.comparison import write_config
from tests.tiny import arguments, change_json, hf_state, refusal, write_checkpoint, write_data, write_files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    here = tmp_path_factory.mktemp("place")
    make_place(here)
    return here


DATA = {  # folder: how write_data makes it
    **{name: {} for name in ("data", "cut", "damaged", "no-val", "nan-meta", "climbing", "fifo")},
    "text-bin": {"meta": False},
    "characters": {"meta": False},
    "one-token": {"val": 1},
    "short-val": {"val": 5},
    "short-train": {"train": 8},
    "other-tokenizer": {"tokenizer": tiny.TOKENIZER | {"name": "gpt2"}},
}
MODELS = {  # folder: how write_checkpoint makes it
    **{name: {} for name in ("ref", "cut-ckpt", "llama", "run/step_00000004", "stateless/step_00000004")},
    **{name: {} for name in ("pickled", "sharded", "deep-json", "huge-header")},
    "untokenized": {"tokenizer": "", "vocab_size": 100, "n_vocab": 100, "eot": 0},
    "other-vocabulary": {"vocab_size": 256, "n_vocab": 256, "eot": 255},
    "short-teacher": {"block_size": 4},
    "two-blocks": {"n_layer": 2},
    "wide": {"n_layer": 2, "n_embd": 24},
    "unbiased": {"n_layer": 2, "bias": False},
}
FILES = {  # path: what is written there
    "text-bin/train.bin": "a text of an odd number of bytes\n",
    "damaged/meta.json": "{",
    "characters/meta.pkl": "",
    "llama/config.json": '{"model_type": "llama"}',
    "remote-code/evil.py": "raise SystemExit('it ran')",
    "run/log.csv": "",
    "sharded/model.safetensors.index.json": '{"weight_map": {"a": "../ref/model.safetensors"}}',
    "deep-json/config.json": "[" * 100_000,
    "huge-header/model.safetensors": (2**60).to_bytes(8, "little") + b"{}",
    "bare-tokenizer/tokenizer.json": bytes_tokenizer(),
    **dict.fromkeys(("file", "ckpt.pt", "not-a.parquet", "not-a.pdf", "empty-not/something"), "text"),
    "typo.py": "n_layer = 2\nlerning_rate = 1\n",
    "code.py": "import os\nos.mkdir('mark')\n",
    "grow.py": "k_start = 2\n",
    "binary.py": bytes(range(256)),
    "a.jsonl": '{"text": "one"}\n{"text": "two"}\n',
    "bad.jsonl": '{"text": "one"}\nnot json\n',
    **dict.fromkeys(("one.jsonl", "hub/train.jsonl", "hub/validation.jsonl"), '{"text": "one"}\n'),
    "utf-16.txt": "text".encode("utf-16-le"),
    "headless.csv": "one,two\nthree,four\n",
    "numbers.json": "[1, 2]",
}


def make_place(here):
    os.rename(write_config(here), here / "comparison.py")
    for name, options in DATA.items():
        write_data(here / name, **options)
    for name, changes in MODELS.items():
        write_checkpoint(here / name, **changes)
    for name in ("whole-llama", "cut-llama", "remote-code"):
        other_models.build("llama").save_pretrained(here / name)
    state = hf_state(tiny.tiny_model())
    for name, tensors in (
        ("untied", {"lm_head.weight": torch.zeros(320, 16)}),
        ("extra-tensor", {"transformer.h.0.attn.c_attn.lora": torch.zeros(2)}),
        ("nan-weights", {"transformer.wte.weight": torch.full((320, 16), float("nan"))}),
        ("overflowing", {name: tensor * 1e30 for name, tensor in state.items()}),
    ):
        write_checkpoint(here / name)
        save_file(state | tensors, here / name / "model.safetensors")
    os.truncate(here / "cut/train.bin", 1001)
    os.unlink(here / "no-val/val.bin")
    change_json(here / "nan-meta/meta.json", dtype="float64")
    shards = {"train": {"shards": [{"file": "../data/train.bin", "tokens": 9}]}}
    change_json(here / "climbing/meta.json", splits=shards)
    os.unlink(here / "fifo/train.bin")
    os.mkfifo(here / "fifo/train.bin")
    os.mkdir(here / "empty")
    os.truncate(here / "cut-ckpt/model.safetensors", 3000)
    change_json(here / "cut-llama/config.json", num_hidden_layers=5)
    change_json(here / "remote-code/config.json", model_type="mine", auto_map={"AutoConfig": "evil.Evil"})
    os.rename(here / "pickled/model.safetensors", here / "pickled/pytorch_model.bin")
    os.unlink(here / "sharded/model.safetensors")
    write_files(here, FILES)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), here / "body.parquet")
    for name, without in (("base.py", ()), ("inherited.py", tiny.SHAPE)):
        flags = [flag[2:].split("=") for flag in arguments("data", "new-out")]
        lines = [f"{k} = {v if v[0].isdigit() else repr(v)}\n" for k, v in flags if k not in without]
        (here / name).write_text("".join(lines))
    train.main(arguments(here / "data", here / "finished", max_iters=4))


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
    assert len(CASES) >= 180 and len({tuple(command) for command, _ in CASES}) == len(CASES)
    assert len({command[0] for command, _ in CASES}) == 10, "of every command"


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


def test_a_run_that_failed_before_its_first_row_is_no_run(tmp_path):
    """Ids above the vocabulary show only when they are read; mended, the same command line works."""
    data = write_data(tmp_path / "data", high=300)
    argv = arguments(data, tmp_path / "out", max_iters=1)
    assert "above the 257 ids of its tokenizer 'bytes'" in refusal(train.main, argv)
    write_data(data)
    train.main(argv)


def test_a_bug_still_shows_its_traceback(place, monkeypatch):
    monkeypatch.setattr(inherit, "check_flags", lambda folder: 1 / 0)
    monkeypatch.chdir(place)
    with pytest.raises(ZeroDivisionError):
        inherit.main(["--ckpt=ref", "--layers=1", "--out=new-out"])
