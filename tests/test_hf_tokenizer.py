"""A checkpoint's tokenizer files: what transformers makes of them is what tokenizer.py does, on any text.

pytest tests/test_hf_tokenizer.py
"""

import dataclasses
import functools
import json
import os
import shutil
import tempfile

import pytest
import tiktoken
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import inherit
import train
from inheritune.data import hf_tokenizer
from inheritune.data.tokenizer import BPE, RANKS_FILE, load_tokenizer
from inheritune.weights import checkpoint, gpt2_format
from tests.assets import english, gpt2_ranks
from tests.tiny import arguments, tiny_config, tiny_model, write_checkpoint, write_data, write_model

# Any text that Rust can hold, and texts in which the rules for cutting words meet more often than by chance.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=100),
    st.text(st.sampled_from(" \n\r\t\v\x00\x85\u00a0\u2028\u3000'abstLDŁſß19²Ⅷ.,!_é\u0301😀👩\u200d中"), max_size=60),
    st.lists(st.sampled_from(["<|endoftext|>", "<|", "|>", "endoftext", "'s", "'LL", " ", "\r\n"])).map("".join),
)


def opened(content):
    """transformers' AutoTokenizer on a folder that holds `content` and a GPT-2 config.json."""
    with tempfile.TemporaryDirectory() as folder:
        for name in content:
            with open(os.path.join(folder, name), "wb") as f:
                f.write(content[name])
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(gpt2_format.config_json(dataclasses.asdict(tiny_config())), f)
        return transformers.AutoTokenizer.from_pretrained(folder)


def ranks_config(**changes):
    return tiny_config(**{"tokenizer": RANKS_FILE, "vocab_size": 50304, "n_vocab": 50257, "eot": 50256} | changes)


@functools.cache
def pair(name):
    """(our tokenizer, transformers') for `bytes`, for GPT-2's ranks, and for these cut by another encoding's rules."""
    if name == "bytes":
        return load_tokenizer("bytes"), opened(hf_tokenizer.files(tiny_config()))
    ours = load_tokenizer(gpt2_ranks())
    if name == RANKS_FILE:
        with tempfile.TemporaryDirectory() as source:
            shutil.copy(gpt2_ranks(), os.path.join(source, RANKS_FILE))
            return ours, opened(hf_tokenizer.files(ranks_config(), source))
    ours = BPE(name, tiktoken.Encoding(**rules_of(name, ours.encoding._mergeable_ranks)), 60001)
    content = hf_tokenizer.as_json(hf_tokenizer.of_encoding(ours.encoding))
    return ours, opened({"tokenizer.json": content, "tokenizer_config.json": hf_tokenizer.settings(1024)})


def rules_of(name, ranks):
    """A tiktoken encoding's arguments with `ranks` for its own, which are not here, and a gap before end-of-text."""
    from tiktoken_ext import openai_public

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
        arguments = openai_public.ENCODING_CONSTRUCTORS[name]()
    return arguments | {"special_tokens": {"<|other|>": 60005, "<|endoftext|>": 60001}}


NAMES = ("bytes", RANKS_FILE, "cl100k_base", "o200k_base")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(text=TEXTS)
def test_ids_equal_ours_on_any_text(name, text):
    ours, theirs = pair(name)
    ids = ours.encode(text)
    assert theirs.encode(text) == theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_ours_on_english(name):
    ours, theirs = pair(name)
    text = "\n".join(english()[:5])
    assert theirs.encode(text) == ours.encode(text)


@pytest.mark.parametrize("name", NAMES)
def test_end_of_text(name):
    ours, theirs = pair(name)
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot
    assert ours.eot not in theirs.encode("a<|endoftext|>b")
    assert theirs.decode([ours.eot]) == "<|endoftext|>"
    assert theirs.decode([*ours.encode("a"), ours.eot], skip_special_tokens=True) == "a"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_character_is_cut_alike(name):
    """The two libraries' regular expressions have the same idea of letters, digits and blanks."""
    ours, theirs = pair(name)
    for start in (*range(0, 0xD800, 256), *range(0xE000, 0x34000, 256), 0xE0000, 0xE0100):  # all that is assigned
        block = map(chr, range(start, start + 256))
        text = "".join(f"a{c}b 1{c}2 .{c}  {c}\n{c}'{c}" for c in block)
        assert theirs.encode(text) == ours.encode(text), f"U+{start:04X} to U+{start + 255:04X}"


def test_tokens_that_no_merge_leads_to():
    """tiktoken takes a word that is a token whole, though merging its bytes would not make it. Ranks need not grow
    with length either, and several pairs may spell one token."""
    tokens = [b"bc", b"abcd", b"ab", b"abc", b"cd", b"abab", b"ababcd", b"dba", b"aa", b"aaa", b"aaaa"]
    ranks = {bytes((b,)): b for b in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
    assert hf_tokenizer.last_merge(b"abc", ranks) == (b"a", b"bc")
    assert hf_tokenizer.last_merge(b"dba", ranks) is None
    special = {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding("x", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens=special)
    content = hf_tokenizer.as_json(hf_tokenizer.of_encoding(encoding))
    theirs = opened({"tokenizer.json": content, "tokenizer_config.json": hf_tokenizer.settings(8)})

    @settings(deadline=None)
    @given(st.text(st.sampled_from("abcd "), max_size=20))
    def check(text):
        assert theirs.encode(text) == encoding.encode_ordinary(text)

    check()
    assert theirs.encode("dba") == [ranks[b"dba"]]


def test_a_training_runs_checkpoints_open(tmp_path):
    data = write_data(tmp_path / "data")
    train.main(arguments(data, str(tmp_path / "out"), max_iters=1))
    folder = checkpoint.find(str(tmp_path / "out"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("hé") == [104, 0xC3, 0xA9] and tokenizer.model_max_length == 8
    transformers.GPT2LMHeadModel.from_pretrained(folder)


def test_ranks_come_from_the_data_and_are_made_once(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(gpt2_ranks(), tmp_path / "data" / RANKS_FILE)
    first = hf_tokenizer.files(ranks_config(), str(tmp_path / "data"))
    assert set(first) == {RANKS_FILE, "tokenizer.json", "tokenizer_config.json"}
    before = hf_tokenizer.make.cache_info()
    again = hf_tokenizer.files(ranks_config(block_size=16), str(tmp_path / "data"))
    after = hf_tokenizer.make.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
    assert again["tokenizer.json"] == first["tokenizer.json"]


def test_inheriting_copies_the_sources_files(tmp_path):
    write_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("as it stands")
    inherit.main(["--ckpt", str(tmp_path / "a"), "--layers", "2", "--out", str(tmp_path / "b")])
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "as it stands"
    for name in ("tokenizer_config.json", "config.json"):
        assert (tmp_path / "b" / name).exists()


def test_without_a_network_a_checkpoint_is_written_all_the_same(tmp_path, monkeypatch, capsys):
    asked = []

    def unreachable(name):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    hf_tokenizer.make.cache_clear()
    model = tiny_model(vocab_size=50304, n_vocab=50257, eot=50256, tokenizer="gpt2", n_embd=4)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, model)
        assert sorted(os.listdir(tmp_path / name)) == ["config.json", "model.safetensors"]
    hf_tokenizer.make.cache_clear()
    assert asked == ["gpt2"]
    assert capsys.readouterr().err.count("checkpoints have no tokenizer.json: tiktoken could not fetch") == 1


@pytest.mark.parametrize("changes", [{"n_vocab": 300, "eot": 256}, {"eot": 255}, {"tokenizer": ""}])
def test_another_vocabulary_than_the_models_is_left_out(changes):
    assert hf_tokenizer.files(tiny_config(**changes)) == {}


def test_a_malformed_ranks_file_spoils_no_checkpoint(tmp_path, capsys):
    (tmp_path / RANKS_FILE).write_text("YQ== 0\n")
    assert set(hf_tokenizer.files(ranks_config(), str(tmp_path))) == {RANKS_FILE}
    assert "no token for byte 0" in capsys.readouterr().err
