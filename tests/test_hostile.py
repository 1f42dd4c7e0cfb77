"""Damaged and hostile files: loaded right or refused in one line that names the file; nothing in them is ever
executed.

pytest tests/test_hostile.py
"""

import ast
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from inheritune.base.errors import UserError
from inheritune.data import reader as data
from inheritune.training.optimizer import load_optimizer, make_optimizer
from inheritune.training.planning import examine_checkpoint
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint
from model import GPT
from tests.tiny import (
    ROOT,
    arguments,
    hf_state,
    same_weights,
    tiny_model,
    write_checkpoint,
    write_data,
)


def refused(work, *names):
    """The message of the UserError that `work` raises; it is a line and has the names."""
    with pytest.raises(UserError) as e:
        work()
    message = str(e.value)
    assert "\n" not in message and all(str(name) in message for name in names), message
    return message


# Checkpoints

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def change_json(path, **changes):
    path.write_text(
        json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "gone"})
    )


def config(**changes):
    return lambda f: change_json(f / CONFIG, **changes)


def wpe(tensor):
    """Put a tensor in the place of the position embeddings; None: leave them out."""
    state = hf_state(tiny_model()) | {"transformer.wpe.weight": tensor}
    return lambda f: save_file({k: v for k, v in state.items() if v is not None}, f / WEIGHTS)


def head(change):
    """Rewrite the JSON at the head of model.safetensors."""

    def damage(f):
        whole = (f / WEIGHTS).read_bytes()
        size = int.from_bytes(whole[:8], "little")
        text = change(whole[8 : 8 + size])
        (f / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])

    return damage


def put(name, content):
    return lambda f: (f / name).write_bytes(content)


def fifo(path):
    if path.exists():
        os.unlink(path)
    os.mkfifo(path)


def loop(path):
    os.unlink(path)
    os.symlink(path.name, path)


CHECKPOINTS = {
    "no weights": lambda f: os.unlink(f / WEIGHTS),
    "a pipe": lambda f: fifo(f / WEIGHTS),
    "a loop of links": lambda f: loop(f / WEIGHTS),
    "cut header": lambda f: os.truncate(f / WEIGHTS, 500),
    "a byte too few": lambda f: os.truncate(f / WEIGHTS, os.path.getsize(f / WEIGHTS) - 1),
    "a byte too many": lambda f: os.truncate(f / WEIGHTS, os.path.getsize(f / WEIGHTS) + 1),
    "sparse": lambda f: os.truncate(f / WEIGHTS, 10**12),
    "header of 2^63": put(WEIGHTS, (2**63).to_bytes(8, "little") + b"{}"),
    "header deep": head(lambda t: b"[" * 100_000),
    "absurd shape": head(lambda t: t.replace(b'"shape":[8,16]', b'"shape":[8000000000000,16]')),
    "negative shape": head(lambda t: t.replace(b'"shape":[8,16]', b'"shape":[-8,-16]')),
    "overlapping": head(lambda t: t.replace(b'"data_offsets":[0,', b'"data_offsets":[4,')),
    "renamed": head(lambda t: t.replace(b"wpe", b"xpe")),
    "duplicate": head(lambda t: t.replace(b"transformer.wpe.weight", b"transformer.wte.weight")),
    "missing": wpe(None),
    "shape": wpe(torch.zeros(9, 16)),
    "eight bits": wpe(torch.zeros(8, 16).to(torch.float8_e4m3fn)),
    "nan": wpe(torch.full((8, 16), float("nan"))),
    "config gone": lambda f: os.unlink(f / CONFIG),
    "config huge": lambda f: os.truncate(f / CONFIG, 10**11),
    "config a list": put(CONFIG, b"[1]"),
    "config deep": put(CONFIG, b'{"a":' * 100_000),
    "config binary": put(CONFIG, bytes(range(256))),
    "config endless number": put(CONFIG, b'{"n_layer": 1' + b"0" * 100_000 + b"}"),
    "layers huge": config(n_layer=10**9),
    "layers true": config(n_layer=True),
    "layers missing": config(n_layer="gone"),
    "layers other": config(n_layer=4),
    "bias text": config(bias="no"),
    "tokenizer a list": config(tokenizer=["bytes"]),
    "code": config(model_type="mine", auto_map={"AutoModel": "evil.Evil"}),
}


@pytest.mark.parametrize("damage", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(tmp_path, damage):
    folder = tmp_path / "ckpt"
    write_checkpoint(folder)
    damage(folder)
    refused(lambda: GPT.from_pretrained(str(folder)), folder)


def test_what_only_looks_odd_is_loaded(tmp_path):
    """Half precision, an old mask, a link to the file, keys that nobody knows."""
    model = tiny_model()
    write_checkpoint(tmp_path / "a")
    half = {k: v.to(torch.float64) for k, v in hf_state(model).items()}
    save_file(
        half | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).bool()}, tmp_path / "a/model.safetensors"
    )
    change_json(tmp_path / "a/config.json", task_specific_params={"x": [1, {"y": None}]})
    os.rename(tmp_path / "a/model.safetensors", tmp_path / "weights")
    os.symlink("../weights", tmp_path / "a/model.safetensors")
    assert same_weights(GPT.from_pretrained(str(tmp_path / "a")), model)


def test_names_in_an_index_stay_in_the_folder(tmp_path):
    write_checkpoint(tmp_path / "a")
    os.rename(tmp_path / "a/model.safetensors", tmp_path / "model.safetensors")  # else the index is not read
    for name in ("../model.safetensors", "/etc/passwd", "x/y.safetensors", "pytorch_model.bin", 3, None):
        index = tmp_path / "a/model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
        refused(lambda: GPT.from_pretrained(str(tmp_path / "a")), index)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder after four steps, and its data."""
    place = tmp_path_factory.mktemp("saved")
    write_data(place / "data")
    train.main(arguments(place / "data", place / "run", max_iters=4))
    return place


STATES = {
    "step text": {"step": "4"},
    "step true": {"step": True},
    "no settings": {"settings": None},
    "row a list": {"row": [1]},
    "row no numbers": {"row": {"loss": "high"}},
    "row too large": {"row": {"loss": 10**400}},
    "best half": {"best_step": 3, "best_val_loss": None},
    "bad steps": {"bad_steps": 1.5},
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_bad_state_is_refused(saved, tmp_path, change):
    folder = tmp_path / "step_00000004"
    shutil.copytree(saved / "run/step_00000004", folder)
    change_json(folder / "state.json", **change)
    refused(lambda: checkpoint.check_resumable(str(folder)), folder / "state.json")


@pytest.mark.parametrize("name", ["state.json", "lineage.json", "optimizer.safetensors", "model.safetensors"])
def test_a_pipe_is_not_waited_for(saved, tmp_path, name):
    folder = tmp_path / "step_00000004"
    shutil.copytree(saved / "run/step_00000004", folder)
    fifo(folder / name)
    refused(lambda: examine_checkpoint(str(folder)), name)


@pytest.mark.parametrize(
    "change",
    [
        {"transformer.wpe.weight/exp_avg": torch.zeros(8, 16, dtype=torch.int64)},
        {"transformer.wpe.weight/exp_avg": torch.zeros(16, 8)},
        {"transformer.wpe.weight/exp_avg": torch.tensor(0.0)},
        {"transformer.wpe.weight/other": torch.zeros(8, 16)},
        {"other": torch.zeros(8, 16)},
    ],
)
def test_a_bad_optimizer_file_is_refused(saved, tmp_path, change):
    folder = tmp_path / "step_00000004"
    shutil.copytree(saved / "run/step_00000004", folder)
    save_file(load_file(folder / "optimizer.safetensors") | change, folder / "optimizer.safetensors")
    model = GPT.from_pretrained(str(folder))
    optimizer = make_optimizer(model, TrainSettings(), torch.device("cpu"))
    refused(lambda: load_optimizer(str(folder), model, optimizer), folder)


# Data folders


def use(folder):
    """All that a run reads of a data folder."""
    train = data.TrainData(str(folder), 8, seed=1)
    train.batch(0, train.n_windows)
    val = data.ValData(str(folder), 8, 10**9, 100)
    for g in range(val.n_groups):
        val.batch(g)


# At random


def garble(path, rng):
    """Truncate, extend, flip bits in, or overwrite a file."""
    size = os.path.getsize(path)
    with open(path, "r+b") as f:
        for _ in range(rng.choice([1, 1, 2, 9])):
            how, at = rng.randrange(5), rng.randrange(size)
            if how == 0:
                f.truncate(at)
                return
            f.seek(at)
            if how == 1:
                f.write(bytes([rng.randrange(256)]))
            elif how == 2:
                byte = f.read(1)[0]
                f.seek(at)
                f.write(bytes([byte ^ 1 << rng.randrange(8)]))
            elif how == 3:
                f.write(rng.randbytes(rng.randrange(40)))
            else:
                f.write(rng.choice([b'"', b"}", b"[", b"-", b"null", b"1e999", b"\0", b"\\u0000", b"true,"]))


def open_everything(place):
    """What a run, and what starts from its checkpoint, would read."""
    folder = str(place / "run/step_00000004")
    examine_checkpoint(folder)
    model = GPT.from_pretrained(folder)
    load_optimizer(folder, model, make_optimizer(model, TrainSettings(), torch.device("cpu")))
    use(place / "data")


FILES = ["run/step_00000004/" + n for n in ("config.json", "state.json", "lineage.json", "model.safetensors")]
FILES += ["run/step_00000004/optimizer.safetensors", "data/meta.json", "data/train.bin"]


@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_garbled_files_are_loaded_or_refused(saved, tmp_path, count):
    rng, refusals = random.Random(7), 0
    for n in range(count):
        name = rng.choice(FILES)
        shutil.copytree(saved, tmp_path / "x", symlinks=True)
        garble(tmp_path / "x" / name, rng)
        try:
            open_everything(tmp_path / "x")
        except UserError as e:
            refusals += 1
            assert str(tmp_path / "x") in str(e) and "\n" not in str(e) and len(str(e)) < 1000, (n, name)
        shutil.rmtree(tmp_path / "x")
    assert count * 0.4 < refusals < count


# Nothing is executed

AUDIT = """
import os, sys, runpy
os.chdir({place!r})
sys.path.insert(0, {root!r})
import torch, numpy, safetensors.torch, pyarrow.parquet, tiktoken, transformers  # their imports run here
import analyze, grow, inherit, prepare, replicate, sample, score, train
from model import GPT
from tools import convert_nanogpt
from inheritune.data import reader as data, sources
from inheritune.training import command_line
from inheritune.base.errors import UserError
seen = []
def hook(event, arguments):
    text = repr(arguments)[:2000]
    harmless = ("open", "os.listdir", "os.scandir", "compile")  # ast.parse is a "compile"
    started = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
    if "pwned" in text and event not in harmless:
        seen.append((event, text[:200]))
    elif event == "pickle.find_class" or event in started:
        seen.append((event, text[:200]))
sys.addaudithook(hook)
loads = 0
def attempt(work):
    global loads
    loads += 1
    try:
        work()
    except (UserError, SystemExit) as e:
        print("refused:", str(e)[:150])
attempt(lambda: command_line.read_config_file("config.py"))
attempt(lambda: command_line.read_config_file("call.py"))
attempt(lambda: GPT.from_pretrained("pickled"))
attempt(lambda: GPT.from_pretrained("code"))
attempt(lambda: GPT.from_pretrained("pwned.pt"))
attempt(lambda: inherit.main(["--ckpt=pwned.pt", "--layers=1", "--out=o"]))
attempt(lambda: convert_nanogpt.main(["pwned.pt", "o"]))
attempt(lambda: data.Tokens("nanogpt", "train"))
attempt(lambda: data.Tokens("npy", "train").read(0, 8))
attempt(lambda: train.main(["--dataset=nanogpt", "--block_size=8", "--batch_tokens=8", "--dry_run"]))
attempt(lambda: sample.main(["--ckpt=code", "--max_new_tokens=1", "--device=cpu"]))
attempt(lambda: prepare.main(["pwned.jsonl", "--tokenizer=bytes", "--num_proc=1", "--out=p"]))
attempt(lambda: prepare.main(["pwned.parquet", "--tokenizer=bytes", "--num_proc=1", "--out=p"]))
attempt(lambda: prepare.main(["pwned.txt", "--tokenizer=pwned-tokenizer.json", "--num_proc=1", "--out=p"]))
print("loads", loads, "seen", seen)
sys.exit(bool(seen) or os.path.exists("pwned"))
"""


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.slow
def test_nothing_is_executed(tmp_path):
    """Under an audit hook, which sees every import, lookup of a pickle, new folder and process."""
    import pickle

    code = "__import__('os').mkdir('pwned')"
    (tmp_path / "config.py").write_text(f"{code}\n")
    (tmp_path / "call.py").write_text(f"n_layer = {code}\n")
    write_checkpoint(tmp_path / "pickled")
    os.unlink(tmp_path / "pickled/model.safetensors")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    write_checkpoint(tmp_path / "code")
    change_json(
        tmp_path / "code/config.json",
        auto_map={"AutoModelForCausalLM": "pwned.Evil"},
        custom_pipelines={"x": "pwned"},
    )
    for name in ("pwned.py", "modeling.py", "tokenizer.py"):
        (tmp_path / "code" / name).write_text(code)
    (tmp_path / "code/tokenizer_config.json").write_text(
        '{"tokenizer_class": "pwned", "auto_map": {"a": "pwned.b"}}'
    )
    torch.save({"model": {"a": Evil()}, "model_args": {}}, tmp_path / "pwned.pt")
    write_data(tmp_path / "nanogpt", meta=False, high=300)
    (tmp_path / "nanogpt/meta.pkl").write_bytes(pickle.dumps(Evil()))
    write_data(tmp_path / "npy", meta=False)
    np.save(tmp_path / "npy/train.bin", np.array([Evil()] * 4, dtype=object), allow_pickle=True)
    os.rename(tmp_path / "npy/train.bin.npy", tmp_path / "npy/train.bin")
    (tmp_path / "pwned.jsonl").write_text('{"text": "' + code + '"}\n{"text": "b"}\n')
    (tmp_path / "pwned.parquet").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "pwned.txt").write_text(code * 10)
    (tmp_path / "pwned-tokenizer.json").write_bytes(pickle.dumps(Evil()))
    done = subprocess.run(
        [sys.executable, "-c", AUDIT.format(place=str(tmp_path), root=ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "loads 14 seen []" in done.stdout and done.stdout.count("refused:") >= 7
    assert not (tmp_path / "pwned").exists()


def test_the_sources_hold_nothing_that_executes_input():
    """No eval, exec, unrestricted pickle or remote code in commands and library."""
    forbidden = ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "yaml.load")
    patterns = ("*.py", "inheritune/*/*.py", "tools/*.py")
    for path in (p for pattern in patterns for p in pathlib.Path(ROOT).glob(pattern)):
        calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
        for called, text in ((ast.unparse(n.func), ast.unparse(n)) for n in calls):
            assert called not in forbidden, path
            safe = path.name == "convert_nanogpt.py" and "weights_only=True" in text
            assert called != "torch.load" or safe, path
            for option in ("allow_pickle=True", "trust_remote_code=True", "shell=True"):
                assert option not in text, path
