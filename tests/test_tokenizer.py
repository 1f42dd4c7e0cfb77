"""Tokenizers: round trips, tiktoken's own ids, and what a malformed ranks file says.

pytest tests/test_tokenizer.py
"""

import base64
import functools

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from inheritune.base.errors import UserError
from inheritune.data.tokenizer import GPT2_PATTERN, from_tiktoken, load_tokenizer, read_ranks, utf8
from tests.assets import gpt2_ranks

SINGLE = [(bytes((b,)), b) for b in range(256)]


def write_ranks(path, entries):
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in entries)
    path.write_bytes(b"".join(lines))
    return str(path)


@given(st.text(st.characters(), max_size=200))  # surrogates included
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert bytes(ids) == tokenizer.decode_bytes(ids) == utf8(text)
    assert tokenizer.decode(ids) == utf8(text).decode()
    assert all(type(i) is int for i in ids)


def test_bytes_description():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.describe() == {"name": "bytes", "n_vocab": 257, "eot": 256}
    assert tokenizer.decode([104, 105, 256]) == "hi<|endoftext|>"
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"
    with pytest.raises(UserError, match="257"):
        tokenizer.decode([257])


def test_half_a_surrogate_pair_becomes_a_replacement():
    assert utf8("a\ud83d\ude00\ud800b").decode() == "a\U0001f600\ufffdb"


@functools.cache
def gpt2_and_reference():
    tokenizer = load_tokenizer(gpt2_ranks())
    reference = tiktoken.Encoding(
        "reference",
        # The pattern as first published with GPT-2; ours is the quicker equivalent.
        pat_str=r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=tokenizer.encoding._mergeable_ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    return tokenizer, reference


@settings(deadline=None)
@given(st.text(st.characters(), max_size=200))
def test_ranks_file_encodes_as_gpt2(text):
    tokenizer, reference = gpt2_and_reference()
    ids = tokenizer.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert tokenizer.decode_bytes(ids) == utf8(text)


def test_gpt2_ranks():
    tokenizer = load_tokenizer(gpt2_ranks())
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.n_vocab, tokenizer.eot, tokenizer.name) == (50257, 50256, "tokenizer.tiktoken")
    assert tokenizer.sha256.startswith("306cd27f")
    assert 50256 not in tokenizer.encode("<|endoftext|>"), "special tokens in a text are text"
    batch = tokenizer.encode_batch(["Hello world", ""])
    assert [ids.tolist() for ids in batch] == [[15496, 995], []]
    assert all(ids.dtype == np.uint32 for ids in batch)
    assert tokenizer.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"
    with pytest.raises(UserError, match="50300"):
        tokenizer.decode([50300])


def test_a_copy_in_the_folder_is_found_first(tmp_path):
    write_ranks(tmp_path / "tokenizer.tiktoken", SINGLE)
    tokenizer = load_tokenizer("tokenizer.tiktoken", folder=tmp_path)
    assert (tokenizer.n_vocab, tokenizer.eot) == (257, 256)
    assert tokenizer.encode("é") == [0xC3, 0xA9]


def test_the_pattern_is_tiktokens():
    from tiktoken_ext import openai_public

    assert openai_public.r50k_pat_str == GPT2_PATTERN


def test_a_million_newlines_are_one_line_not_a_panic():
    with pytest.raises(UserError, match="runs of blanks"):
        load_tokenizer(gpt2_ranks()).encode("\n" * 1_000_000 + "x")


def broken(entries, **changes):
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in entries]
    for line, text in changes.items():
        lines[int(line[1:]) - 1] = text
    return b"\n".join(lines) + b"\n"


MALFORMED = {
    "line 3: 'a$b=' is not base64": broken(SINGLE, _3=b"a$b= 2"),
    "line 4: expected a token": broken(SINGLE, _4=b"YQ=="),
    "line 5: expected a token": broken(SINGLE, _5=b""),
    "line 6: expected a token in base64, one space": broken(SINGLE, _6=b"YQ==  5"),
    "line 7: expected": broken(SINGLE, _7=b"YQ== -1"),
    "line 8: expected": broken(SINGLE, _8=b"YQ== 99999999999999999999"),
    "line 9: the token is empty": broken(SINGLE, _9=b" 8"),
    "line 257: the token of rank 97 a second time": broken([*SINGLE, (b"a", 256)]),
    "line 257: rank 5 is taken by line 6": broken([*SINGLE, (b"ab", 5)]),
    "none of them has rank 256": broken([*SINGLE, (b"ab", 300)]),
    "no token for byte 255": broken(SINGLE[:255]),
    "no token for byte 0": b"",
    "line 1: expected": b"\x00\xff\xfe not a text file",
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_ranks(tmp_path, message):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(MALFORMED[message])
    with pytest.raises(UserError) as e:
        read_ranks(path)
    assert message in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_ranks_file_too_large_or_missing(tmp_path):
    path = tmp_path / "x.tiktoken"
    with open(path, "wb") as f:
        f.truncate((64 << 20) + 1)  # a sparse file
    with pytest.raises(UserError, match="67,108,865 bytes"):
        load_tokenizer(str(path))
    with pytest.raises(UserError, match=r"no tokenizer file nowhere\.tiktoken"):
        load_tokenizer("nowhere.tiktoken")


def test_unknown_name_tells_the_nearest():
    with pytest.raises(UserError, match=r"did you mean gpt2\?"):
        load_tokenizer("gpt-2")


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    tiktoken.registry.ENCODINGS.pop("p50k_edit", None)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        from_tiktoken("p50k_edit")


def test_tiktokens_own_cache(tmp_path, monkeypatch):
    with open(gpt2_ranks(), "rb") as f:
        (tmp_path / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").write_bytes(f.read())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tokenizer = load_tokenizer("r50k_base")
    assert tokenizer.describe() == {"name": "r50k_base", "n_vocab": 50257, "eot": 50256}
    assert tokenizer.encode("Hello world") == [15496, 995]
