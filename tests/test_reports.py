"""What people ran into: each test is named by what somebody did. pytest tests/test_reports.py"""

import json
import os

import pytest
import torch

import analyze
import inherit
import sample
import score
import train
from inheritune.data import hf_tokenizer
from inheritune.data.tokenizer import read_ranks
from inheritune.training.parsing import NANOGPT, parse
from inheritune.training.settings import GrowSettings, ReplicateSettings, TrainSettings
from model import GPT, GPTConfig
from tests.assets import gpt2_ranks
from tests.tiny import arguments, column, gpt2, refusal, tiny_model, write_checkpoint, write_data

OUR_NAMES = TrainSettings.__dataclass_fields__


# Settings


@pytest.mark.parametrize("name", NANOGPT)
def test_a_person_brings_nanogpts_config(tmp_path, name):
    """The line says what to write instead, and in a file where."""
    (tmp_path / "theirs.py").write_text(f"n_layer = 2\n{name} = 5\n")
    said = refusal(train.main, [str(tmp_path / "theirs.py")])
    assert said == f"train.py: {tmp_path}/theirs.py:2: {name} is not a setting but nanoGPT's: {NANOGPT[name]}"
    assert name not in OUR_NAMES
    for flag in (f"--{name}=5", f"--{name.replace('_', '-')}"):
        assert refusal(train.main, [flag]) == f"train.py: {flag.split('=')[0]} is nanoGPT's: {NANOGPT[name]}"


def test_a_person_writes_a_path_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.py").write_text('dataset = "~/data"\nteacher = "~/teacher"\n')
    argv = [str(tmp_path / "config.py"), "--out_dir=~/run", "--init_from=~/ref", "--results=~/r"]
    argv += ["--reference=~/ref", "--reference_config=~/ref.py"]
    train_settings, rep, _ = parse((TrainSettings, ReplicateSettings), argv, "")
    found = [train_settings.dataset, train_settings.teacher, train_settings.out_dir, train_settings.init_from]
    found += [rep.results, rep.reference, rep.reference_config]
    names = ("data", "teacher", "run", "ref", "r", "ref", "ref.py")
    assert found == [os.path.join(tmp_path, name) for name in names]
    grow, _ = parse((GrowSettings,), argv[-2:], "")
    assert grow.reference == str(tmp_path / "ref") and grow.reference_config == str(tmp_path / "ref.py")


# Checkpoints


def lose_bias(folder):
    """Take our key out of config.json, as a tool does that keeps only the keys it knows."""
    config = json.loads((folder / "config.json").read_text())
    del config["bias"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("lose", [lose_bias, lambda folder: None], ids=["key lost", "key kept"])
def test_a_person_fine_tunes_a_bias_free_model_in_transformers(tmp_path, lose):
    """There it has biases, which are trained: they come back, and go on through inherit.py and train.py."""
    import transformers

    write_checkpoint(tmp_path / "ours", bias=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    idx = torch.randint(257, (2, 8))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    theirs(idx, labels=idx).loss.backward()
    optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    lose(tmp_path / "theirs")
    back = GPT.from_pretrained(str(tmp_path / "theirs")).eval()
    assert back.config.bias
    torch.testing.assert_close(back(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    inherit.main(["--ckpt", str(tmp_path / "theirs"), "--layers=2", "--out", str(tmp_path / "small")])
    assert GPT.from_pretrained(str(tmp_path / "small")).config.bias
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    data = write_data(tmp_path / "data")
    train.main(arguments(data, tmp_path / "run", init_from=tmp_path / "theirs", max_iters=4, **shape))


def other_gpt2(folder, vocabulary=None, file="tokenizer.json"):
    """A folder of transformers' with 50,257 ids, and a tokenizer with this vocabulary."""
    gpt2(tiny_model(n_layer=1, vocab_size=50257)).save_pretrained(folder)
    if vocabulary:
        content = (
            {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}} if "tok" in file else vocabulary
        )
        (folder / file).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("rows", [257, 264, 320])
def test_a_person_uses_a_model_whose_vocabulary_others_padded_or_enlarged(tmp_path, rows):
    """As nanoGPT pads to 50,304 and resize_token_embeddings adds rows: all scripts go by train.py's rule."""
    folder, data = str(tmp_path / "theirs"), write_data(tmp_path / "data", val=600)
    gpt2(tiny_model(n_layer=4, block_size=16, vocab_size=rows)).save_pretrained(folder)
    assert GPTConfig.from_folder(folder).tokenizer == ""
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    out = str(tmp_path / "run")
    train.main(arguments(data, out, init_from=folder, max_iters=4, eval_tokens=600, **shape))
    common = ["--ckpt", folder, "--data", data, "--device", "cpu", "--out"]
    score.main([*common, str(tmp_path / "score.json")])
    loss = json.loads((tmp_path / "score.json").read_text())["loss"]["loss"]
    assert loss == pytest.approx(column(out, "val_loss")[0], rel=0.05)  # the latter on whole windows only
    analyze.main([*common, str(tmp_path / "analysis"), "--sequences", "5"])
    inherit.main(["--ckpt", folder, "--layers", "auto", "--data", data, "--out", str(tmp_path / "small")])


def test_a_person_uses_a_model_with_too_few_rows(tmp_path):
    folder, data = str(tmp_path / "theirs"), write_data(tmp_path / "data")
    gpt2(tiny_model(vocab_size=200)).save_pretrained(folder)
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    for main, argv in (
        (train.main, arguments(data, tmp_path / "run", init_from=folder, **shape)),
        (score.main, ["--ckpt", folder, "--data", data]),
        (analyze.main, ["--ckpt", folder, "--data", data, "--out", tmp_path / "analysis"]),
        (inherit.main, ["--ckpt", folder, "--data", data, "--layers", "auto", "--out", tmp_path / "small"]),
    ):
        assert f"{data} has 257 ids, {folder} only 200" in refusal(main, argv)


@pytest.mark.parametrize("file, name", [("tokenizer.json", "tokenizer.json"), ("vocab.json", "")])
def test_a_person_brings_a_gpt2_of_another_language(tmp_path, file, name):
    """It has as many ids as the English one."""
    vocabulary = {f"ж{i}": i for i in range(50257)}
    assert GPTConfig.from_folder(other_gpt2(tmp_path / "a", vocabulary, file)).tokenizer == name


def test_a_person_brings_a_gpt2_without_a_tokenizer(tmp_path):
    folder = other_gpt2(tmp_path / "a")
    assert GPTConfig.from_folder(folder).tokenizer == ""
    said = refusal(sample.main, ["--ckpt", folder, "--device", "cpu"])
    assert "does not say what tokenizer it was trained with" in said


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_a_person_brings_a_fine_tuned_gpt2(tmp_path, file):
    """Whatever form its tokenizer is saved in, it is GPT-2's."""
    ranks = read_ranks(gpt2_ranks())
    printable = hf_tokenizer.stand_ins()
    vocabulary = {"".join(printable[byte] for byte in token): i for token, i in ranks.items()}
    items = [("<|endoftext|>", 50256), *vocabulary.items()]
    config = GPTConfig.from_folder(other_gpt2(tmp_path / "a", dict(items), file))
    assert (config.tokenizer, config.n_vocab, config.eot) == ("gpt2", 50257, 50256)


def test_a_released_gpt2_lies_in_the_cache_without_its_tokenizer(tmp_path):
    """Earlier versions fetched only config.json and weights."""
    for name, tokenizer in (("gpt2-large", "gpt2"), ("openai-community--gpt2", "gpt2"), ("who--gpt2-x", "")):
        folder = tmp_path / f"models--{name}/snapshots/0123"
        assert GPTConfig.from_folder(other_gpt2(folder)).tokenizer == tokenizer


def test_a_person_inherits_from_a_model_with_files_of_all_kinds(tmp_path):
    """All but weights come along, and the special ids stay as they were."""
    source = tmp_path / "source"
    write_checkpoint(source, n_layer=3)
    config = json.loads((source / "config.json").read_text())
    config |= {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 9}
    (source / "config.json").write_text(json.dumps(config))
    kept = ["vocab.txt", "spiece.model", "chat_template.jinja", "generation_config.json", "README.md"]
    left = [
        "pytorch_model.bin",
        "optimizer.pt",
        "model.safetensors.index.json.bak.h5",
        "SHA256SUMS",
        ".gitattributes",
    ]
    for name in kept + left:
        (source / name).write_text(name)
    (source / "tokenizer.json").write_text("{}")
    (source / "onnx").mkdir()
    inherit.main(["--ckpt", str(source), "--layers=2", "--out", str(tmp_path / "small")])
    ours = ["config.json", "model.safetensors", "lineage.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "small")) == sorted(kept + ours)
    assert all((tmp_path / "small" / name).read_text() == name for name in kept)
    assert (tmp_path / "small/tokenizer.json").read_text() == "{}"
    made = json.loads((tmp_path / "small/config.json").read_text())
    assert {key: made[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "n_layer")} == {
        "bos_token_id": 5,
        "eos_token_id": 7,
        "pad_token_id": 9,
        "n_layer": 2,
    }
