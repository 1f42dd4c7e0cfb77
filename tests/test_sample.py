"""Sampling from the command line."""

import io
import json
import sys

import pytest
import tokenizers
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import sample
from inheritune.data.tokenizer import TextStream, bytes_tokenizer, load_tokenizer
from inheritune.models.open_model import load_model
from model import GPT
from tests.data.test_tokenizer import llama_like, train_tokenizer
from tests.other_models import build
from tests.tiny import tiny_model, write_checkpoint, write_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "ckpt"
    write_checkpoint(folder)
    return str(folder)


def test_prints_what_generate_draws(model_folder, capsys):
    sample.main(["--ckpt", model_folder, "--prompt", "ab", "--max_new_tokens", "20", "--seed", "3"])
    shown = capsys.readouterr().out
    model, tokenizer = GPT.from_pretrained(model_folder).eval(), load_tokenizer("bytes")
    generator = torch.Generator().manual_seed(3)
    tokens = model.generate(torch.tensor([[97, 98]]), 20, 0.8, generator=generator)
    ids = [int(t) for t in tokens]
    ids = ids[: ids.index(256)] if 256 in ids else ids
    assert shown == "ab" + tokenizer.decode(ids) + "\n"


def test_streams_token_by_token_and_whole_characters(model_folder):
    """Every write is one token's text; half a character waits for its other half."""

    class Recorder(io.StringIO):
        pieces = []

        def write(self, text):
            self.pieces.append(text)
            return len(text)

    tokens = (torch.tensor([b]) for b in [*"aé".encode(), 256])
    rows = sample.stream(tokens, TextStream(load_tokenizer("bytes")), {256}, Recorder())
    assert Recorder.pieces == ["a", "", "é", "\n"]
    assert rows == [list("aé".encode())]


def test_special_tokens_of_a_chat_are_read_and_written(tmp_path, capsys):
    """A fine-tuned GPT-2 with added special tokens: in the prompt they are their ids, and it can answer by
    them, as with transformers."""
    tokenizer = train_tokenizer("bpe", ["a few words"] * 9)
    tokenizer.add_special_tokens(["<|user|>", "<|bot|>"])
    user, bot = map(tokenizer.token_to_id, ("<|user|>", "<|bot|>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    model, folder = tiny_model(n_vocab=bot + 1, tokenizer="tokenizer.json", eot=1), tmp_path / "chat"
    with torch.no_grad():  # its answer is always the same
        model.lm_head.weight[bot] *= 10
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[bot])
    folder.mkdir()
    write_model(folder, model, tokenizer_from=str(tmp_path))
    ours = sample.open_tokenizer_of(str(folder), model.config, None)
    assert sample.encode_prompt("<|user|>a", ours) == [user, *tokenizer.encode("a").ids]
    sample.main(["--ckpt", str(folder), "--prompt=<|user|>a", "--max_new_tokens=2", "--temperature=0"])
    assert capsys.readouterr().out == "<|user|>a<|bot|><|bot|>\n"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, bot]}))
    sample.main(["--ckpt", str(folder), "--prompt=<|user|>a", "--max_new_tokens=2", "--temperature=0"])
    assert capsys.readouterr().out == "<|user|>a\n", "a chat's turn ends by another token than a text"


def test_each_row_ends_at_its_own_end(capsys):
    steps = [torch.tensor(ids) for ids in ([97, 99], [98, 2], [256, 100], [101, 101])]
    rows = sample.stream(iter(steps), TextStream(load_tokenizer("bytes")), {2, 256}, sys.stdout)
    assert rows == [[97, 98], [99]] and capsys.readouterr().out == "ab\n"


def test_all_samples_read_alike_also_with_blanks_that_belong_to_words(tmp_path, capsys):
    tokenizer, folder = llama_like(tmp_path / "tokenizer"), tmp_path / "model"
    n_vocab = load_tokenizer(tokenizer).n_vocab
    folder.mkdir()
    model = tiny_model(n_vocab=n_vocab, vocab_size=n_vocab, tokenizer="tokenizer.json", eot=0)
    write_model(str(folder), model, tokenizer_from=tokenizer)
    flags = ["--prompt=a word", "--max_new_tokens=9", "--temperature=0", "--num_samples=3"]
    sample.main(["--ckpt", str(folder), *flags])
    first, *others = [text.strip("\n") for text in capsys.readouterr().out.split("-" * 20)]
    assert others == [first, first] and first.startswith("a word")


@pytest.fixture(params=["llama", "gemma2"])
def decoder(request, tmp_path):
    """(transformers' model, its folder with a tokenizer of bytes that begins each text with end-of-text)."""
    theirs = build(request.param)
    theirs.save_pretrained(tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_str(bytes_tokenizer().decode())
    template = "<|endoftext|> $A"
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<|endoftext|>", 256)])
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return theirs, str(tmp_path / "model")


def test_greedy_text_of_any_decoder_is_transformers(decoder, capsys):
    """... which ends at eos_token_id 2."""
    theirs, folder = decoder
    sample.main(["--ckpt", folder, "--prompt", "ab", "--max_new_tokens", "50", "--temperature", "0"])
    idx = transformers.AutoTokenizer.from_pretrained(folder)("ab", return_tensors="pt").input_ids
    assert idx.tolist() == [[256, 97, 98]]
    assert sample.encode_prompt("<|endoftext|>ab", load_tokenizer(folder)) == [256, 97, 98], "not twice"
    ids = theirs.generate(idx, max_new_tokens=50, do_sample=False)[0, 3:].tolist()
    ids = ids[: next((i for i, t in enumerate(ids) if t in (2, 256)), 50)]
    assert len(ids) > 5, "the test needs a model that goes on"
    assert capsys.readouterr().out == "ab" + load_tokenizer("bytes").decode(ids) + "\n"


def test_sixteen_bits_are_of_the_weights_not_of_the_positions(decoder, monkeypatch, capsys):
    model, moved = load_model(decoder[1]), []
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    monkeypatch.setattr(sample, "load_model", lambda folder: model)
    model.to = lambda device: moved.append({p.dtype for p in model.parameters()})
    sample.main(["--ckpt", decoder[1], "--max_new_tokens", "2", "--dtype", "bfloat16"])
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == before
    assert moved == [{torch.bfloat16}]


def test_a_prompt_beyond_the_context_is_said_to_be_cut(model_folder, capsys):
    sample.main(["--ckpt", model_folder, "--prompt", "a" * 9, "--max_new_tokens", "1"])
    assert capsys.readouterr().err == "the prompt has 9 tokens, of which the model reads only the last 8\n"


def test_output_is_flushed_before_the_end(model_folder, monkeypatch):
    """A reader of a pipe sees text while it is drawn: every token is flushed."""
    flushes = []
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushes.append(1))
    sample.main(["--ckpt", model_folder, "--max_new_tokens", "4", "--temperature", "0"])
    assert len(flushes) >= 1
