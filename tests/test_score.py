"""score.py: the loss against a plain computation, the tables, and lm_eval's own numbers."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import score
import train
from inheritune.base.files import read_json, write_json
from inheritune.data import reader as data
from inheritune.training.distributed import Ranks
from model import GPT
from tests import other_models
from tests.tiny import ROOT, TOKENIZER, refusal, write_checkpoint, write_data

TEXT = "Déjà vu: the quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score") / "ckpt"
    write_checkpoint(folder, block_size=64)
    return str(folder)


def write_text(folder, texts):
    """A data folder with texts in bytes for validation, as prepare.py writes it."""
    os.makedirs(folder)
    ids = [i for text in texts for i in (*text.encode(), 256)]
    np.array(ids, "<u2").tofile(f"{folder}/val.bin")
    n_bytes = sum(len(text.encode()) for text in texts)
    splits = {"val": {"bytes": n_bytes, "shards": [{"file": "val.bin", "tokens": len(ids)}]}}
    write_json(f"{folder}/meta.json", {"tokenizer": TOKENIZER, "dtype": "uint16", "splits": splits})
    return str(folder), np.array(ids)


def scored(ckpt, folder, tmp_path, *more):
    """The `loss` entry of score.py's JSON."""
    out = str(tmp_path / "scores.json")
    score.main(["--ckpt", ckpt, "--data", folder, "--device", "cpu", "--out", out, *more])
    return read_json(out)["loss"]


def plain_nats(ckpt, ids, T):
    """Summed loss in float64 by transformers, window after window."""
    model = transformers.AutoModelForCausalLM.from_pretrained(ckpt).double().eval()
    total = 0.0
    for start in range(0, len(ids) - 1, T):
        window = torch.tensor(ids[start : start + T + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("batch_size", ["1", "3", "100"])
def test_loss_is_the_plain_one(ckpt, tmp_path, capsys, batch_size):
    folder, ids = write_text(tmp_path / "data", [TEXT, TEXT * 2, "", "é"])
    n = len(ids) - 1
    assert n % 64, "the last window is a shorter one"
    found = scored(ckpt, folder, tmp_path, "--batch_size", batch_size)
    nats = plain_nats(ckpt, ids, 64)
    assert found["tokens_scored"] == n and found["loss"] == pytest.approx(nats / n, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-5)
    assert found["bytes"] == len(ids) - 4, "four end-of-texts"
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(ids) - 4), rel=1e-6)
    said = capsys.readouterr().out
    assert f"loss {found['loss']:.4f} nats/token" in said and f"over {n} tokens in windows of 64\n" in said


def test_the_context_can_be_that_of_another_model(ckpt, tmp_path):
    folder, ids = write_text(tmp_path / "data", [TEXT])
    found = scored(ckpt, folder, tmp_path, "--block_size", "16")
    assert found["block_size"] == 16
    assert found["loss"] == pytest.approx(plain_nats(ckpt, ids, 16) / (len(ids) - 1), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_loss_of_other_decoders_is_transformers(kind, tmp_path):
    other_models.build(kind).save_pretrained(tmp_path / "ckpt")
    folder, ids = write_text(tmp_path / "data", [TEXT, TEXT * 2])
    found = scored(str(tmp_path / "ckpt"), folder, tmp_path)
    nats = plain_nats(str(tmp_path / "ckpt"), ids, 64)
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)


def test_on_whole_windows_it_is_the_validation_loss(ckpt, tmp_path):
    """That of train.py, to the last digit: 4 × 64 + 1 tokens, validated in groups of the same size."""
    folder = write_data(tmp_path / "data", val=257)
    val = data.ValData(folder, 64, 257, 3)
    loss = train.mean_loss(GPT.from_pretrained(ckpt), val, Ranks(), torch.device("cpu"), torch.float32)
    assert scored(ckpt, folder, tmp_path, "--batch_size", "3")["loss"] == loss


def test_another_split_and_no_byte_count(ckpt, tmp_path, capsys):
    found = scored(ckpt, write_data(tmp_path / "data"), tmp_path, "--split", "train")
    assert found["tokens_scored"] == 2999 and found["bits_per_byte"] is None
    assert "bits per byte" not in capsys.readouterr().out


@pytest.mark.slow
def test_torchrun_gives_the_same_number(ckpt, tmp_path):
    folder, _ = write_text(tmp_path / "data", [TEXT] * 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["score.py", "--ckpt", ckpt, "--data", folder, "--device", "cpu", "--batch_size", "2"]
    command += ["--out", str(tmp_path / "two.json")]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("nats/token") == 1
    two = read_json(tmp_path / "two.json")["loss"]
    assert two == scored(ckpt, folder, tmp_path, "--batch_size", "2")


def test_tasks_need_lm_eval_and_one_process(ckpt, monkeypatch):
    argv = ["--ckpt", ckpt, "--tasks", "piqa"]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install -r requirements-extra.txt" in refusal(score.main, argv)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--tasks runs in one process" in refusal(score.main, argv)


# Tasks, where lm_eval is installed

CHOICE = """task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/toy.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a task of forty questions, some longer than the model's 64 positions."""
    pytest.importorskip("lm_eval", reason="pip install -r requirements-extra.txt")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    words = ["the", "fox", "dog", "é", "<|endoftext|>", "jumps\n", "over", "lazy", "quick", "😀", "one"]
    with open(tmp_path / "toy.jsonl", "w") as f:
        for i in range(40):
            question = " ".join(rng.choice(words, 4 + i // 2))
            choices = [" ".join(rng.choice(words, n)) for n in (1, 2, 3)]
            row = {"question": question, "choices": choices, "answer": int(rng.integers(3))}
            f.write(json.dumps(row) + "\n")
    (tmp_path / "choice.yaml").write_text(CHOICE.replace("FOLDER", str(tmp_path)))
    return tmp_path


@pytest.mark.slow
def test_tasks_are_what_lm_eval_says_by_hand(ckpt, toy, capsys):
    asked = ["--tasks", "toy_choice", "--include_path", str(toy), "--device", "cpu", "--batch_size", "4"]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", *asked, "--model_args"]
    command += [f"pretrained={ckpt},dtype=float32", "--output_path", str(toy / "by_hand")]
    subprocess.run(command, cwd=toy, check=True, capture_output=True)
    (by_hand,) = (toy / "by_hand").rglob("results_*.json")
    by_hand = json.loads(by_hand.read_text())["results"]
    score.main(["--ckpt", ckpt, *asked, "--out", str(toy / "scores.json")])
    ours = json.loads((toy / "scores.json").read_text())["tasks"]
    assert ours["results"]["toy_choice"] == by_hand["toy_choice"]
    assert "acc_norm" in capsys.readouterr().out  # lm_eval's own table


@pytest.mark.slow
def test_a_limit_no_tokenizer_files_and_an_unknown_task(ckpt, toy, tmp_path):
    argv = ["--tasks", "toy_choice", "--include_path", str(toy), "--limit", "3", "--device", "cpu"]
    score.main(["--ckpt", ckpt, *argv, "--out", str(toy / "scores.json")])
    found = json.loads((toy / "scores.json").read_text())["tasks"]
    assert found["n-samples"]["toy_choice"]["effective"] == found["limit"] == 3
    write_checkpoint(tmp_path / "bare", block_size=64)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.unlink(tmp_path / "bare" / file)
    assert "has no tokenizer files" in refusal(score.main, ["--ckpt", tmp_path / "bare", *argv])
    said = refusal(score.main, ["--ckpt", ckpt, "--tasks", "arc_eazy"])
    assert "lm_eval knows no task 'arc_eazy' (did you mean arc_easy?)" in said
