"""A checkpoint's tokenizer files: what transformers makes of them is what tokenizer.py does, on any text."""

import functools
import os
import pathlib
import tempfile

import pytest
import tiktoken
import transformers
from hypothesis import given, settings

from inheritune.data import tokenizer as tokenizer_module
from inheritune.data.tokenizer import load_tokenizer, tokenizer_files
from tests.assets import gpt2
from tests.data.test_tokenizer import TEXTS
from tests.tiny import tiny_config, tiny_model, write_files, write_model

NAMES = ("bytes", "gpt2")


@functools.cache
def pair(name):
    """(our tokenizer, transformers' AutoTokenizer on a folder with the files and a GPT-2 config.json)."""
    ours = load_tokenizer(gpt2() if name == "gpt2" else name)
    with tempfile.TemporaryDirectory() as folder:
        files = tokenizer_files(tiny_config(tokenizer=name, block_size=1024))
        write_files(pathlib.Path(folder), files | {"config.json": '{"model_type": "gpt2"}'})
        return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(text=TEXTS)
def test_ids_equal_ours_on_any_text(name, text):
    ours, theirs = pair(name)
    ids = ours.encode(text)
    assert ours.decode_bytes(ids) == text.encode()
    assert theirs.encode(text) == theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_end_of_text(name):
    ours, theirs = pair(name)
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot
    assert ours.eot not in theirs.encode("a<|endoftext|>b")
    assert theirs.decode([ours.eot]) == "<|endoftext|>"
    assert theirs.decode([*ours.encode("a"), ours.eot], skip_special_tokens=True) == "a"


def test_without_a_network_a_checkpoint_is_written_all_the_same(tmp_path, monkeypatch, capsys):
    asked = []

    def unreachable(name):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    tokenizer_module.gpt2_files.cache_clear()
    model = tiny_model(vocab_size=50304, n_vocab=50257, eot=50256, tokenizer="gpt2", n_embd=4)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, model)
        assert sorted(os.listdir(tmp_path / name)) == ["config.json", "model.safetensors"]
    tokenizer_module.gpt2_files.cache_clear()
    assert asked == ["gpt2"]
    said = capsys.readouterr().err
    assert said.count("checkpoints have no tokenizer files: tiktoken could not fetch") == 1


@pytest.mark.parametrize("name", ["", "cl100k_base", "tokenizer.json"])
def test_what_cannot_be_made_is_left_out(name):
    assert tokenizer_files(tiny_config(tokenizer=name)) == {}


def test_the_folders_own_files_come_first(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    assert tokenizer_files(tiny_config(tokenizer="gpt2"), str(tmp_path)) == {"vocab.json": b"{}"}
