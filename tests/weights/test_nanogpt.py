"""nanoGPT's ckpt.pt: read exactly, executed never."""

import dataclasses
import json
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from inheritune.data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from tests.data.test_tokenizer import train_tokenizer
from tests.tiny import refusal, same_weights, tiny_model
from tools import convert_nanogpt

ARGS = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True, "vocab_size": 320}


def write_ckpt(path, module, prefix="", masks=True, **changes):
    """What nanoGPT's train.py saves for this model: tensors, whatever its loop needs, and its config."""
    c = module.config
    state = {f"{prefix}{k}": v.detach().clone() for k, v in module.named_parameters()}
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    for i in range(c.n_layer if masks else 0):
        state[f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(1, 1, c.block_size, c.block_size).tril()
    sizes = {key: getattr(c, key) for key in (*ARGS, "dropout")}
    if c.scale_attn_by_inverse_layer_idx:
        sizes["scale_attn_by_inverse_layer_idx"] = True  # as the paper's fork says it
    saved = {"model": state, "optimizer": {"state": {}}, "model_args": sizes, "iter_num": 5}
    saved |= {"best_val_loss": torch.tensor(2.5), "config": {"out_dir": "out", "device": "cuda"}, **changes}
    torch.save(saved, path)
    return str(path)


def convert(path, out, *flags):
    convert_nanogpt.main([str(path), str(out), *flags])
    return str(out)


@pytest.mark.parametrize("bias, prefix", [(True, ""), (False, "_orig_mod."), (True, "_orig_mod.module.")])
def test_every_weight_arrives(tmp_path, bias, prefix):
    model = tiny_model(bias=bias, scale_attn_by_inverse_layer_idx=not bias)
    path = write_ckpt(tmp_path / "ckpt.pt", model, prefix, masks=bias, best_val_loss=np.float32(2.5))
    loaded = GPT.from_pretrained(convert(path, tmp_path / "out"))
    assert same_weights(loaded, model)
    assert loaded.config == dataclasses.replace(model.config, n_vocab=320, tokenizer="", eot=-1)


def test_a_scripts_own_config_is_read(tmp_path, monkeypatch):
    """As build-nanogpt saves it: an object of a dataclass in place of model_args."""
    script = types.ModuleType("train_gpt2")
    fields = ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"]
    script.GPTConfig = dataclasses.make_dataclass("GPTConfig", fields)
    script.GPTConfig.__module__ = "train_gpt2"
    monkeypatch.setitem(sys.modules, "train_gpt2", script)
    path = str(tmp_path / "ckpt.pt")
    torch.save({"model": tiny_state(), "config": script.GPTConfig(8, 320, 3, 2, 16), "step": 5}, path)
    monkeypatch.delitem(sys.modules, "train_gpt2")
    assert same_weights(GPT.from_pretrained(convert(path, tmp_path / "out")), tiny_model())


def test_a_tokenizers_own_files_are_kept(tmp_path):
    tokenizer = train_tokenizer("bpe", ["a few words of some language"] * 9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer.id_to_token(0)}))
    path = write_ckpt(tmp_path / "ckpt.pt", tiny_model())
    folder = convert(path, tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(GPTConfig.from_folder(folder).tokenizer, folder)
    assert (ours.encode("a few"), ours.eot) == (tokenizer.encode("a few").ids, 0)


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_gpt2s_sizes_are_taken_for_gpt2_aloud(tmp_path, vocab_size, capsys):
    path = write_ckpt(tmp_path / "ckpt.pt", tiny_model(vocab_size=vocab_size, n_layer=1))
    config = GPTConfig.from_folder(convert(path, tmp_path / "out"))
    assert (config.tokenizer, config.n_vocab, config.eot) == ("gpt2", 50257, 50256)
    assert f"{vocab_size} ids: taken for tokens of gpt2" in capsys.readouterr().out


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    small = write_ckpt(tmp_path / "small.pt", tiny_model(vocab_size=200))
    said = refusal(convert_nanogpt.main, [small, tmp_path / "no", "--tokenizer", "bytes"])
    assert said.endswith("--tokenizer bytes has 257 ids, the model only 200")


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def tiny_state():
    return {name: p.detach() for name, p in tiny_model().named_parameters()}


UNKNOWN = ARGS | {"activation": "relu", "causal": False, "window_size": 4, "logit_softcap": 30}
BAD = {
    "a model with more": (
        lambda p, m: write_ckpt(p, tiny_model(), model_args=UNKNOWN),
        "this model has activation='relu', causal=False, window_size=4, logit_softcap=30",
    ),
    "llm.c's": (lambda p, m: p.write_bytes((20240326).to_bytes(4, "little") * 300), "llm.c's; export it"),
    "before torch 1.6": (
        lambda p, m: torch.save({"model": {}}, p, _use_new_zipfile_serialization=False),
        "torch.save's form before torch 1.6",
    ),
    "a function in the pickle": (
        lambda p, m: torch.save({"model": {"x": Evil(m)}}, p),
        "is no whole nanoGPT checkpoint",
    ),
    "a plain pickle": (lambda p, m: p.write_bytes(pickle.dumps(Evil(m))), "is no nanoGPT checkpoint"),
    "cut": (lambda p, m: os.truncate(write_ckpt(p, tiny_model()), 20_000), "is no nanoGPT checkpoint"),
    "no sizes": (lambda p, m: write_ckpt(p, tiny_model(), model_args={}), "lacks nanoGPT's model_args"),
    "zero heads": (lambda p, m: write_ckpt(p, tiny_model(), model_args=ARGS | {"n_head": 0}), "n_head is 0"),
    "other depth": (lambda p, m: write_ckpt(p, tiny_model(), model_args=ARGS | {"n_layer": 4}), "is missing"),
    "numbers": (lambda p, m: write_ckpt(p, tiny_model(), model={"a": 1}), "a is not a tensor"),
    "an untied head": (
        lambda p, m: write_ckpt(p, tiny_model(), model=tiny_state() | {"lm_head.weight": torch.ones(2, 2)}),
        "though the two are tied",
    ),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_anything_else_is_refused_and_nothing_runs(tmp_path, make, message):
    path, mark = tmp_path / "ckpt.pt", tmp_path / "mark"
    make(path, str(mark))
    said = refusal(convert_nanogpt.main, [path, tmp_path / "out"])
    assert message in said and str(path) in said and len(said.splitlines()) == 1
    assert not mark.exists() and not (tmp_path / "out").exists()
