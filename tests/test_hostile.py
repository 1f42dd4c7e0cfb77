"""Damaged and hostile files: loaded right or refused in one line that names them, and never executed."""

import ast
import json
import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from inheritune.base.errors import UserError
from inheritune.training.optimizer import load_optimizer, make_optimizer
from inheritune.training.planning import examine_checkpoint
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint
from model import GPT
from tests.tiny import ROOT, change_json, hf_state, same_weights, tiny_model, write_checkpoint


def refused(work, *names):
    """The message of the UserError that `work` raises; it is a line and has the names."""
    with pytest.raises(UserError) as e:
        work()
    message = str(e.value)
    assert "\n" not in message and all(str(name) in message for name in names), message
    return message


# Checkpoints

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def config(**changes):
    return lambda f: change_json(f / CONFIG, **changes)


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
    os.unlink(path)
    os.mkfifo(path)


CHECKPOINTS = {
    "no weights": lambda f: os.unlink(f / WEIGHTS),
    "a pipe": lambda f: fifo(f / WEIGHTS),
    "a loop of links": lambda f: (os.unlink(f / WEIGHTS), os.symlink(WEIGHTS, f / WEIGHTS)),
    "cut header": lambda f: os.truncate(f / WEIGHTS, 500),
    "a byte too few": lambda f: os.truncate(f / WEIGHTS, os.path.getsize(f / WEIGHTS) - 1),
    "sparse": lambda f: os.truncate(f / WEIGHTS, 10**12),
    "header of 2^63": put(WEIGHTS, (2**63).to_bytes(8, "little") + b"{}"),
    "header deep": head(lambda t: b"[" * 100_000),
    "absurd shape": head(lambda t: t.replace(b'"shape":[8,16]', b'"shape":[8000000000000,16]')),
    "negative shape": head(lambda t: t.replace(b'"shape":[8,16]', b'"shape":[-8,-16]')),
    "overlapping": head(lambda t: t.replace(b'"data_offsets":[0,', b'"data_offsets":[4,')),
    "duplicate": head(lambda t: t.replace(b"transformer.wpe.weight", b"transformer.wte.weight")),
    "config gone": lambda f: os.unlink(f / CONFIG),
    "config huge": lambda f: os.truncate(f / CONFIG, 10**11),
    "config deep": put(CONFIG, b'{"a":' * 100_000),
    "config binary": put(CONFIG, bytes(range(256))),
    "config endless number": put(CONFIG, b'{"n_layer": 1' + b"0" * 100_000 + b"}"),
    "layers huge": config(n_layer=10**9),
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
    """Double precision, an old mask, a link to the file, keys that nobody knows."""
    model = tiny_model()
    write_checkpoint(tmp_path / "a")
    state = {k: v.to(torch.float64) for k, v in hf_state(model).items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).bool()
    save_file(state, tmp_path / "a/model.safetensors")
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


STATES = {
    "step text": {"step": "4"},
    "no settings": {"settings": 0},
    "row no numbers": {"row": {"loss": "high"}},
    "row too large": {"row": {"loss": 10**400}},
    "best half": {"best_step": 3, "best_val_loss": "low"},
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_bad_state_is_refused(plain, tmp_path, change):
    folder = shutil.copytree(f"{plain}/step_00000012", tmp_path / "step_00000012")
    change_json(folder / "state.json", **change)
    refused(lambda: checkpoint.check_resumable(str(folder)), folder / "state.json")


@pytest.mark.parametrize("name", ["state.json", "lineage.json", "optimizer.safetensors", "model.safetensors"])
def test_a_pipe_is_not_waited_for(plain, tmp_path, name):
    folder = shutil.copytree(f"{plain}/step_00000012", tmp_path / "step_00000012")
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
        {"transformer.ln_f.weight/step": None},
    ],
)
def test_a_bad_optimizer_file_is_refused(plain, tmp_path, change):
    folder = shutil.copytree(f"{plain}/step_00000012", tmp_path / "step_00000012")
    tensors = load_file(folder / "optimizer.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "optimizer.safetensors")
    model = GPT.from_pretrained(str(folder))
    optimizer = make_optimizer(model, TrainSettings(), torch.device("cpu"))
    refused(lambda: load_optimizer(str(folder), model, optimizer), folder)


# Nothing is executed


def test_code_in_a_folder_is_not_run(tmp_path):
    """However config.json and tokenizer_config.json name it."""
    folder = tmp_path / "a"
    write_checkpoint(folder)
    change_json(folder / CONFIG, auto_map={"AutoModel": "evil.Evil"}, custom_pipelines={"x": "evil"})
    change_json(folder / "tokenizer_config.json", tokenizer_class="evil", auto_map={"x": "evil.T"})
    for name in ("evil.py", "modeling.py", "tokenizer.py"):
        (folder / name).write_text("raise SystemExit('it ran')")
    sample.main(["--ckpt", str(folder), "--max_new_tokens=1", "--device=cpu"])


def test_the_sources_hold_nothing_that_executes_input():
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
