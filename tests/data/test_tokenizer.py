"""Tokenizers: round trips, tiktoken's and transformers' own ids, streamed text, and what broken files say."""

import base64
import functools
import json
import os
import tempfile

import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, write_json
from inheritune.base.tokenizer_identity import package_errors
from inheritune.data import text_files
from inheritune.data import tokenizer as tokenizer_module
from inheritune.data.sources import open_files
from inheritune.data.tokenizer import TextStream, bytes_tokenizer, gpt2_files, load_tokenizer, utf8
from inheritune.weights.gpt2_format import read_config
from tests.assets import english, gpt2, gpt2_ranks

# Any text that Rust can hold, and texts in which the rules for cutting words meet more often than by chance.
ODD = " \n\r\t\v\x00\x85\u00a0\u2028\u3000'abstLDŁſß19²Ⅷ.,!_é\u0301😀👩\u200d中"
PARTS = ["<|endoftext|>", "<|", "[SEP]", "</s>", "endoftext", "'s", "'LL", " ", "\r\n"]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=100),
    st.text(st.sampled_from(ODD), max_size=60),
    st.lists(st.sampled_from(PARTS)).map("".join),
)


# Bytes


@given(st.text(st.characters(), max_size=200))  # surrogates included
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert bytes(ids) == tokenizer.decode_bytes(ids) == utf8(text)
    assert tokenizer.decode(ids) == utf8(text).decode()
    assert all(type(i) is int for i in ids)


@pytest.mark.parametrize(
    "name, n_vocab, ids", [("bytes", 257, [*b"Hello world"]), ("gpt2", 50257, [15496, 995])]
)
def test_bytes_and_gpt2(name, n_vocab, ids):
    tokenizer, eot = load_tokenizer(gpt2() if name == "gpt2" else name), n_vocab - 1
    assert tokenizer.describe() == {"name": name, "n_vocab": n_vocab, "eot": eot}
    assert eot not in tokenizer.encode("<|endoftext|>"), "special tokens in a text are text"
    assert tokenizer.decode_bytes(tokenizer.encode("é\ud800")) == utf8("é\ud800") == "é\ufffd".encode()
    batch, lengths = tokenizer.encode_batch(["Hello world", "", "Hello world"])
    assert (batch.tolist(), lengths) == (ids + ids, [len(ids), 0, len(ids)])
    assert tokenizer.decode([*ids, eot]) == "Hello world<|endoftext|>"
    with pytest.raises(UserError, match=f"{n_vocab}"):
        tokenizer.decode([n_vocab])


# tiktoken


def test_a_long_text_is_encoded_in_parts(monkeypatch):
    """A million blanks would overflow tiktoken's regular expressions; a cut changes no token."""
    tokenizer = load_tokenizer(gpt2())
    for text in ("\n" * 1_000_000 + "x", " " * 1_000_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "".join(english())[:50_000] + "don't 日本語。\n\n  x\t1234567 8\n" * 50
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "MAX_CHARACTERS", 1000)
    assert max(map(len, tokenizer_module.cut(text))) <= 1000 and tokenizer.encode(text) == whole


def test_tiktokens_own_cache_and_without_one_what_to_do(tmp_path, monkeypatch):
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in gpt2_ranks().items()]
    (tmp_path / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").write_bytes(b"".join(lines))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    tokenizer = load_tokenizer("r50k_base")
    assert tokenizer.describe() == {"name": "r50k_base", "n_vocab": 50257, "eot": 50256}
    assert tokenizer.encode("Hello world") == [15496, 995]
    tiktoken.registry.ENCODINGS.pop("p50k_edit", None)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        tokenizer_module.from_tiktoken("p50k_edit")
    # a cached vocabulary of another size
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(AssertionError()))
    with pytest.raises(UserError, match=r"could not fetch the r50k_base vocabulary \(AssertionError\)"):
        tokenizer_module.from_tiktoken("r50k_base")


# Hugging Face


KINDS = {  # how it is trained, how many ids it gets, and its special tokens, of which the last ends a text
    "bpe": (tokenizers.ByteLevelBPETokenizer, 600, ["<|pad|>", "<|endoftext|>"]),
    "word_piece": (tokenizers.BertWordPieceTokenizer, 900, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]),
    "unigram": (tokenizers.SentencePieceUnigramTokenizer, 900, ["<unk>", "</s>"]),
}


def train_tokenizer(name, texts):
    make, size, special = KINDS[name]
    options = {"unk_token": "<unk>"} if name == "unigram" else {}
    options |= {"vocab_size": size, "special_tokens": special, "show_progress": False}
    tokenizer = make()
    tokenizer.train_from_iterator(texts, **options)
    return tokenizer


@functools.cache
def trained(name):
    return train_tokenizer(name, english()[:20]).to_str()


def save(folder, name):
    """Write a tokenizer of this kind as a model's folder has it."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/tokenizer.json", "w") as f:
        f.write(trained(name))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": KINDS[name][2][-1]}
    write_json(f"{folder}/tokenizer_config.json", content)
    return str(folder)


@functools.cache
def pair(name):
    """(our tokenizer, transformers') from the same folder."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder, name)
        return load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None)
@given(text=TEXTS)
def test_ids_equal_transformers_on_any_text(name, text):
    ours, theirs = pair(name)
    expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode(text) == expected
    if name == "bpe":
        assert ours.decode(expected) == text
    assert ours.decode(expected) == theirs.decode(expected, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_special_tokens_and_half_characters(name):
    ours, theirs = pair(name)
    text = "\n".join(english()[:5])
    ids, lengths = ours.encode_batch([text, "a", text])
    assert ours.encode(text) == ids[: lengths[0]].tolist() == ids[-lengths[2] :].tolist()
    assert len(ids) == sum(lengths) and ours.eot == theirs.eos_token_id and ours.n_vocab == len(theirs)
    about = {"name": "tokenizer.json", "n_vocab": len(theirs), "eot": ours.eot, "sha256": ours.sha256}
    assert ours.describe() == about
    for special in ("<|endoftext|>", "[SEP]"):  # (Unigram has no rule by which </s> is more than one token)
        assert ours.eot not in ours.encode(f"a{special}b")
    assert ours.encode("a\ud800b") == ours.encode("a\ufffdb")
    with pytest.raises(UserError, match=f"vocabulary of {ours.n_vocab}"):
        ours.decode([ours.n_vocab])


def write_gpt2(folder, config='{"model_type": "gpt2", "eos_token_id": 50256}'):
    os.makedirs(folder)
    gpt2()
    for name, content in gpt2_files().items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(config)
    return str(folder)


def test_gpt2s_own_files_are_gpt2_however_they_are_laid_out(tmp_path):
    original = load_tokenizer(write_gpt2(tmp_path / "a"))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    again.add_special_tokens({"pad_token": "[PAD]"})  # as people do
    again.save_pretrained(tmp_path / "b")
    for ours in (original, load_tokenizer(str(tmp_path / "b"))):
        assert ours.describe() == load_tokenizer(gpt2()).describe() and not ours.files
        text = "Hello <|endoftext|> world"
        assert ours.encode(text) == load_tokenizer("gpt2").encode(text)
    assert load_tokenizer("gpt2", str(tmp_path / "a")).encode("Hello world") == [15496, 995]

    content = read_json(tmp_path / "b/tokenizer.json")
    merges = content["model"]["merges"]
    lower_case = {"normalizer": {"type": "Lowercase"}}
    for changed in (lower_case, {"model": content["model"] | {"merges": [*merges[1::-1], *merges[2:]]}}):
        (tmp_path / "b/tokenizer.json").write_text(json.dumps(content | changed))
        assert load_tokenizer(str(tmp_path / "b")).name == "tokenizer.json"


@pytest.mark.parametrize("added", [{"eos_token": "<|im_end|>"}, ["<user>", "<bot>"]])
def test_a_gpt2_with_other_ids_in_a_text_is_told_from_gpt2(tmp_path, added):
    """Another token ends its texts, or added ones occur in them: data and checkpoint say the same."""
    theirs = transformers.AutoTokenizer.from_pretrained(write_gpt2(tmp_path / "a"))
    theirs.add_special_tokens(added) if isinstance(added, dict) else theirs.add_tokens(added)
    theirs.save_pretrained(tmp_path / "b")
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": len(theirs)}
    config = {"model_type": "gpt2", "eos_token_id": theirs.eos_token_id} | sizes
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    ours, model = load_tokenizer(str(tmp_path / "b")), read_config(str(tmp_path / "b"))
    assert (ours.name, ours.n_vocab, ours.eot) == ("tokenizer.json", len(theirs), theirs.eos_token_id)
    assert (model["tokenizer"], model["n_vocab"], model["eot"]) == (ours.name, ours.n_vocab, ours.eot)
    text = "a <user> b"
    assert ours.encode(text) == theirs(text)["input_ids"]


def test_added_tokens_beside_gpt2s_own_files_are_those_of_transformers(tmp_path):
    folder = write_gpt2(tmp_path / "a")
    (tmp_path / "a/added_tokens.json").write_text('{"<bot>": 50258, "[PAD]": 50259, "<user>": 50257}')
    (tmp_path / "a/special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    (tmp_path / "a/tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.name, ours.n_vocab) == ("tokenizer.json", len(theirs)) and len(theirs) == 50260
    for text in ("a <user> b <bot>c", " <user>  x", "a<|endoftext|>b", "a [PAD] b"):
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
    (tmp_path / "a/added_tokens.json").write_text('{"<user>": 50300}')
    with pytest.raises(UserError, match=r"added_tokens.json: <user> cannot get the id 50300"):
        load_tokenizer(folder)


def llama_like(folder):
    """A tokenizer that puts a blank before every text, as Llama 2's does, and has no pre-tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special[:1], show_progress=False)
    tokenizer.train_from_iterator([*english()[:20], "".join(map(chr, range(32, 127)))], trainer)
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] |= {token: len(vocab) + i for i, token in enumerate(special[1:])}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    os.makedirs(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    content = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    (folder / "tokenizer_config.json").write_text(content)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "bpe", "unigram", "gpt2"])
def test_a_long_text_in_pieces_has_transformers_ids_of_the_whole(tmp_path, monkeypatch, kind):
    make = {"llama": llama_like, "gpt2": write_gpt2}.get(kind, lambda folder: save(folder, kind))
    folder = make(tmp_path / "a")
    monkeypatch.setattr(text_files, "PIECE", 1000)
    text = "".join(english()[:5])[:30_000] + "a b\nc  d\n\n e 1 2" * 50
    text += "日本語のテキスト。\n" * 500 if kind == "llama" else ""  # (each letter is a token)
    (tmp_path / "a.txt").write_text(text)
    pieces = list(open_files([str(tmp_path / "a.txt")], [], True, None, "", "out").pieces)
    ours = load_tokenizer("gpt2" if kind == "gpt2" else folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids, _ = ours.encode_batch([piece.texts[0] for piece in pieces], [piece.continues for piece in pieces])
    expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(pieces) > 20 and ids.tolist() == expected


def test_meta_json_names_the_token_that_texts_begin_with(tmp_path):
    folder = llama_like(tmp_path / "a")
    assert "bos" not in load_tokenizer(folder).describe()
    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    begin = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    tokenizer.post_processor = begin
    tokenizer.save(f"{folder}/tokenizer.json")
    assert load_tokenizer(folder).describe()["bos"] == 0


@pytest.mark.parametrize("bos", ["!", {"content": "!"}])
def test_gpt2s_own_files_may_ask_for_a_token_that_texts_begin_with(tmp_path, bos):
    """As OPT's do."""
    folder, config = write_gpt2(tmp_path / "a"), {"bos_token": bos, "eos_token": "<|endoftext|>"}
    for asked, expected in ((True, 0), (False, None)):
        (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": asked}))
        assert load_tokenizer(folder).describe().get("bos") == expected


def test_special_tokens_without_a_row_in_the_model_do_not_count(tmp_path):
    """As Gemma 3's image token."""
    before = load_tokenizer(save(tmp_path, "bpe"))
    before.tokenizer.add_special_tokens(["<image>"])
    before.tokenizer.save(f"{tmp_path}/tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": before.n_vocab}))
    ours = load_tokenizer(str(tmp_path))
    assert ours.describe() == before.describe()
    ours.recognise_special()
    assert ours.n_vocab == before.n_vocab and ours.encode("<image>") == [before.n_vocab]


def test_the_digest_is_of_the_vocabulary_not_of_the_file(tmp_path):
    ours = load_tokenizer(save(tmp_path / "a", "bpe"))
    transformers.AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() != (tmp_path / "b/tokenizer.json").read_bytes()
    assert ours.sha256 == load_tokenizer(str(tmp_path / "b")).sha256
    content = read_json(tmp_path / "a/tokenizer.json")
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(content))
    assert ours.sha256 != load_tokenizer(str(tmp_path / "b")).sha256


def test_a_data_folders_copy_is_found_and_says_what_ends_a_text(tmp_path):
    save(tmp_path / "a", "unigram")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "x": 1}')
    ours = load_tokenizer(str(tmp_path / "a"))
    (tmp_path / "data").mkdir()
    for name, content in ours.files.items():
        (tmp_path / "data" / name).write_bytes(content)
    again = load_tokenizer("tokenizer.json", str(tmp_path / "data"))
    assert again.describe() == ours.describe() and again.encode("Hello") == ours.encode("Hello")
    assert read_json(tmp_path / "data" / "tokenizer_config.json") == {"eos_token": "</s>", "x": 1}


# files of the same names as GPT-2's, to which other rules belong
QWEN2 = {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Qwen2"}'}


@pytest.mark.parametrize(
    "content, config, said",
    [
        (b"{}", {}, "not a tokenizer of the tokenizers package"),
        (bytes_tokenizer(), {}, "does not say which token ends a text"),
        (bytes_tokenizer(), {"tokenizer_config.json": '{"eos_token": "</s>"}'}, "does not say which token"),
        (bytes_tokenizer(), {"config.json": '{"eos_token_id": 50256}'}, "does not say which token"),
        (bytes_tokenizer(), {"tokenizer_config.json": "["}, "tokenizer_config.json is not valid JSON"),
        (None, {"vocab.txt": "a\nb\n"}, "there is no tokenizer"),
        (None, QWEN2, "there is no tokenizer"),
        (None, {"vocab.json": "{", "merges.txt": ""}, "not a tokenizer of the tokenizers package"),
    ],
)
def test_broken_files_are_one_line(tmp_path, content, config, said):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    for name, text in config.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as e:
        load_tokenizer(str(tmp_path))
    assert said in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="there is no tokenizer"):
        load_tokenizer(str(tmp_path))


# Streaming


@pytest.mark.parametrize("name", ["bytes", "gpt2", *KINDS])
def test_a_stream_gives_whole_characters_and_in_the_end_all(name):
    if name in KINDS:
        tokenizer = pair(name)[0]
    else:
        tokenizer = load_tokenizer(gpt2() if name == "gpt2" else name)
    prompt, text = "Hello", " world, naïve 日本語 🙂 and café 👩\u200d👩 one two three"
    before, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    if ids[: len(before)] != before:
        ids = before + tokenizer.encode(text)
    stream = TextStream(tokenizer, before)
    pieces = [stream.add(i) for i in ids[len(before) :]]
    assert not any("\ufffd" in piece for piece in pieces) and stream.end() == ""
    assert tokenizer.decode(before) + "".join(pieces) == tokenizer.decode(ids)
    assert sum(map(bool, pieces)) > 5


def test_a_stream_ends_with_what_is_no_character():
    stream = TextStream(load_tokenizer("bytes"))
    assert [stream.add(b) for b in b"a\xff\xffb\xe2\x82"] == ["a", "", "", "\ufffd\ufffdb", "", ""]
    assert stream.end() == "\ufffd"


def test_a_panic_of_the_package_is_one_line():
    """pyo3's PanicException is a BaseException; Ctrl-C, another one, stays what it is."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(UserError, match="index out of bounds"), package_errors("x"):
        raise panic("index out of bounds")
    with pytest.raises(KeyboardInterrupt), package_errors("x"):
        raise KeyboardInterrupt
