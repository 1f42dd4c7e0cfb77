"""Mistakes: each is answered by one clear line (or one list of them) and a non-zero exit, and leaves nothing behind.

pytest tests/test_bad_input.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import ROOT, TOKENIZER, arguments, refusal, write_checkpoint, write_data

import inherit
import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all sorts of things to point at; scripts run in it."""
    here = tmp_path_factory.mktemp("place")
    write_data(here / "data")
    write_data(here / "short-val", val=5)
    write_data(here / "short-train", train=8)
    write_data(here / "other-tokenizer", tokenizer=TOKENIZER | {"name": "gpt2"})
    write_data(here / "gpt2-data", meta=False)
    write_data(here / "cut")
    os.truncate(here / "cut/train.bin", 1001)
    write_data(here / "damaged")
    (here / "damaged/meta.json").write_text("{")
    write_data(here / "no-val")
    os.unlink(here / "no-val/val.bin")
    os.mkdir(here / "empty")
    write_checkpoint(here / "ref")
    write_checkpoint(here / "untokenized", tokenizer="", vocab_size=100, n_vocab=100, eot=0)
    write_checkpoint(here / "cut-ckpt")
    os.truncate(here / "cut-ckpt/model.safetensors", 3000)
    write_checkpoint(here / "llama")
    (here / "llama/config.json").write_text(json.dumps({"model_type": "llama"}))
    write_checkpoint(here / "run/step_00000004")
    (here / "run/log.csv").write_text("")
    write_checkpoint(here / "stateless/step_00000004")
    (here / "file").write_text("text")
    (here / "typo.py").write_text("n_layer = 2\nlerning_rate = 1\n")
    (here / "code.py").write_text("import os\nos.mkdir('mark')\n")
    (here / "grow.py").write_text("k_start = 2\n")
    return here


def everything(folder):
    return {os.path.join(d, n) for d, folders, names in os.walk(folder) for n in folders + names}


def check(main, argv, phrases, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = everything(place)
    message = refusal(main, argv)
    for phrase in [phrases] if isinstance(phrases, str) else phrases:
        assert phrase in message
    lines = message.splitlines()
    if len(lines) > 1:
        assert f"{len(lines) - 1} problems:" in lines[0] and all(line.startswith("  ") for line in lines[1:])
    assert all(len(line) < 400 for line in lines) and "Traceback" not in message
    assert message.startswith(f"{main.__module__}.py: "), "it says who speaks"
    assert everything(place) == before
    assert capfd.readouterr().err == ""


TRAIN = {
    "unknown flag": (["--n_layers=2"], "unknown argument '--n_layers=2' (did you mean --n_layer?)"),
    "wrong type": (["--n_layer=two"], "--n_layer must be a whole number, not 'two'"),
    "two configs": (["typo.py", "code.py"], "unknown argument 'code.py'"),
    "out of range": (["--dropout=2"], "--dropout must be between 0.0 and 0.999, not 2"),
    "config missing": (["config/gone.py"], "no config file 'config/gone.py'"),
    "config typo": (["typo.py"], "typo.py:2: lerning_rate is not a setting (did you mean learning_rate?)"),
    "config with code": (["code.py"], "code.py:1: only lines like max_iters = 1000 are allowed"),
    "config is a folder": (["empty"], "empty"),
    "config of grow.py": (["grow.py"], "grow.py:1: k_start is not a setting but one of grow.py"),
    "no dataset": ({"dataset": "gone"}, "no data folder 'gone': prepare it first"),
    "empty dataset": ({"dataset": "empty"}, "empty has no train.bin and no meta.json"),
    "damaged meta": ({"dataset": "damaged"}, "damaged/meta.json is not valid JSON"),
    "cut bin": ({"dataset": "cut"}, "cut/train.bin has 1,001 bytes, but meta.json says 3,000 tokens"),
    "no val": ({"dataset": "no-val"}, "no-val/val.bin is missing"),
    "val too short": ({"dataset": "short-val"}, "val has 5 tokens"),
    "train too short": ({"dataset": "short-train"}, "has 8 tokens, fewer than block_size + 1"),
    "batch not divisible": ({"batch_tokens": 100}, "not a multiple of block_size × ranks = 8 × 1: use 96 or 104"),
    "width and heads": ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
    "part of nothing": ({"data_start": 0.5, "data_end": 0.5}, "data_start 0.5 is not below data_end 0.5"),
    "part too small": ({"data_start": 0.5, "data_end": 0.501}, "has 3 tokens, fewer than block_size + 1"),
    "min_lr": ({"learning_rate": 1e-4}, "min_lr 0.001 is above learning_rate 0.0001: set both"),
    "no cuda": ({"device": "cuda"}, "torch sees no CUDA GPU; use --device cpu"),
    "no mps": ({"device": "mps"}, "torch finds no Apple GPU"),
    "unknown device": ({"device": "tpu0"}, "'tpu0' is not a device"),
    "unsupported device": ({"device": "meta"}, "meta is not supported"),
    "nothing to resume": ({"resume": "must"}, "holds no checkpoint to continue"),
    "a run is there": ({"out_dir": "run"}, "run already holds a run: continue it with --resume=auto"),
    "no state to resume": ({"out_dir": "stateless", "resume": "auto"}, "state.json does not exist"),
    "out_dir is a file": ({"out_dir": "file"}, "file"),
    "out_dir is a checkpoint": ({"out_dir": "ref"}, "ref is a checkpoint"),
    "inherit from nothing": ({"inherit_layers": 1}, "inherit_layers needs a model to inherit from"),
    "zero layers": ({"init_from": "ref", "inherit_layers": 0}, "--inherit_layers must be at least 1"),
    "too many layers": ({"init_from": "ref", "inherit_layers": 4}, "inherit_layers 4 is more than the 3 blocks of ref"),
    "other shape": ({"init_from": "ref", "n_embd": 32}, "n_embd 32 was asked for, but the model from ref has 16"),
    "longer context": ({"init_from": "ref", "block_size": 16}, "block_size 16 is above the 8 positions of ref"),
    "wrong path": ({"init_from": "./gone/ckpt"}, "no folder './gone/ckpt' here"),
    "not a checkpoint": ({"init_from": "empty"}, "empty is neither a checkpoint"),
    "a file": ({"init_from": "file"}, "file is a file; a checkpoint is a folder"),
    "another architecture": ({"init_from": "llama"}, "model_type is 'llama'; only gpt2 is implemented"),
    "damaged weights": ({"init_from": "cut-ckpt"}, "cut-ckpt/model.safetensors is damaged"),
    "hub id offline": (
        {"init_from": "gpt2-large", "dataset": "gpt2-data", "block_size": 8},
        "Hugging Face hub did not",
    ),
    "unknown hub id offline": ({"init_from": "no/such"}, "no folder 'no/such' here, and the Hugging Face hub"),
    "other tokenizer": (
        {"init_from": "ref", "dataset": "other-tokenizer"},
        "other-tokenizer was tokenised with 'gpt2', but ref was trained with 'bytes'",
    ),
    "too few ids": ({"init_from": "untokenized"}, "data has 257 ids, untokenized only 100"),
    "several at once": (
        {"n_head": 3, "batch_tokens": 100, "data_start": 0.9, "data_end": 0.1, "min_lr": 1, "dataset": "gone"},
        ["5 problems:", "no data folder", "n_head 3", "batch_tokens 100", "data_start 0.9", "min_lr 1"],
    ),
    "several at once, inherited": (
        {"init_from": "ref", "inherit_layers": 9, "n_head": 1, "block_size": 64, "batch_tokens": 100},
        ["4 problems:", "inherit_layers 9", "n_head 1", "block_size 64", "batch_tokens 100"],
    ),
}


@pytest.mark.parametrize("given, phrases", TRAIN.values(), ids=TRAIN)
def test_train(given, phrases, place, monkeypatch, capfd):
    if isinstance(given, dict):
        shape = {"n_layer": None, "n_head": None, "n_embd": None, "block_size": None} if "init_from" in given else {}
        given = arguments("data", "new-out", **shape | given)
    check(train.main, given, phrases, place, monkeypatch, capfd)


INHERIT = {
    "nothing": ([], "the following arguments are required: --ckpt, --out"),
    "unknown flag": (["--ckpt=ref", "--layer=2"], "unknown argument '--layer=2' (did you mean --layers?)"),
    "neither": (["--ckpt=ref"], "give --layers K or --blocks LIST"),
    "both": (["--ckpt=ref", "--layers=1", "--blocks=0"], "--blocks says which blocks: leave out --layers"),
    "not a number": (["--ckpt=ref", "--layers=two"], "--layers must be a whole number from 1 on, or auto, not 'two'"),
    "zero": (["--ckpt=ref", "--layers=0"], "a whole number from 1 on, or auto, not '0'"),
    "negative": (["--ckpt=ref", "--layers=-1"], "a whole number from 1 on, or auto, not '-1'"),
    "too many": (["--ckpt=ref", "--layers=4"], "--layers 4 is more than the 3 blocks"),
    "block not there": (
        ["--ckpt=ref", "--blocks=0,7"],
        "asked for block 7, but the model has blocks 0 to 2 (3 layers)",
    ),
    "blocks empty": (["--ckpt=ref", "--blocks=0,"], "'' is not a number or a range"),
    "blocks backwards": (["--ckpt=ref", "--blocks=2-0"], "'2-0' is not a number or a range; write them like 0-11,23"),
    "blocks gibberish": (["--ckpt=ref", "--blocks=a,b"], "'a' is not a number or a range"),
    "out exists": (["--ckpt=ref", "--layers=1", "--out=empty"], "empty exists already; choose another --out"),
    "out is a file": (["--ckpt=ref", "--layers=1", "--out=file"], "file exists already"),
    "out under a file": (["--ckpt=ref", "--layers=1", "--out=file/x"], "file"),
    "no checkpoint": (["--ckpt=./gone", "--layers=1"], "no folder './gone' here"),
    "not a checkpoint": (["--ckpt=empty", "--layers=1"], "empty is neither a checkpoint"),
    "data for a checkpoint": (["--ckpt=data", "--layers=1"], "data is neither a checkpoint"),
    "a file": (["--ckpt=ref/model.safetensors", "--layers=1"], "is a file; a checkpoint is a folder"),
    "damaged": (["--ckpt=cut-ckpt", "--layers=1"], "cut-ckpt/model.safetensors is damaged"),
    "another architecture": (["--ckpt=llama", "--layers=1"], "only gpt2 is implemented"),
    "hub id offline": (["--ckpt=gpt2-xl", "--layers=1"], "no folder 'gpt2-xl' here, and the Hugging Face hub"),
    "onto without layers": (["--ckpt=ref", "--onto=ref"], "--onto needs --layers K"),
    "onto as deep": (["--ckpt=ref", "--layers=3", "--onto=ref"], "layers must be"),
    "onto another": (["--ckpt=ref", "--layers=3", "--onto=gone/x"], "no folder 'gone/x' here"),
}


@pytest.mark.parametrize("argv, phrases", INHERIT.values(), ids=INHERIT)
def test_inherit(argv, phrases, place, monkeypatch, capfd):
    if argv and not any(a.startswith("--out") for a in argv):
        argv = [*argv, "--out=new-out"]
    check(inherit.main, argv, phrases, place, monkeypatch, capfd)


@pytest.mark.parametrize(
    "argv, phrase",
    [
        (["train.py", "--dataset=gone", "--n_head=7", "--batch_tokens=1000"], "train.py: 3 problems:"),
        (
            ["inherit.py", "--ckpt=gpt2", "--layers=6", "--out=new-out"],
            "inherit.py: no folder 'gpt2' here, and the Hug",
        ),
    ],
    ids=["train", "inherit"],
)
def test_as_a_process(argv, phrase, place):
    command = [sys.executable, os.path.join(ROOT, argv[0]), *argv[1:]]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(phrase) and "Traceback" not in done.stderr
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
    monkeypatch.setattr(inherit, "identify", lambda folder: 1 / 0)
    monkeypatch.chdir(place)
    with pytest.raises(ZeroDivisionError):
        inherit.main(["--ckpt=ref", "--layers=1", "--out=new-out"])


def test_ctrl_c_says_how_to_go_on(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        train.main(arguments("data", "new-out"))
    assert end.value.code == 130 and "interrupted; run the same command again" in capsys.readouterr().err
