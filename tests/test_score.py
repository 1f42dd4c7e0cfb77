"""score.py: the loss against a plain computation, the tables, and lm_eval's own numbers.

pytest tests/test_score.py
"""

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
from inheritune.data import reader as data
from inheritune.training.distributed import Ranks
from model import GPT
from tests import other_models
from tests.tiny import ROOT, hf_state, refusal, write_checkpoint, write_data, write_model

TEXT = "Déjà vu: the quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A tiny random model of bytes with 64 positions."""
    folder = tmp_path_factory.mktemp("score") / "ckpt"
    write_checkpoint(folder, block_size=64)
    return str(folder)


def write_text(folder, texts, split="val", **tokenizer):
    """A data folder with one split of texts in bytes, as prepare.py writes it."""
    os.makedirs(folder)
    ids = [i for text in texts for i in (*text.encode(), 256)]
    np.array(ids, "<u2").tofile(os.path.join(folder, f"{split}.bin"))
    n_bytes = sum(len(text.encode()) for text in texts)
    splits = {split: {"bytes": n_bytes, "shards": [{"file": f"{split}.bin", "tokens": len(ids)}]}}
    described = {"name": "bytes", "n_vocab": 257, "eot": 256} | tokenizer
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump({"tokenizer": described, "dtype": "uint16", "splits": splits}, f)
    return str(folder), np.array(ids)


def scored(ckpt, folder, tmp_path, *more):
    """The `loss` entry of score.py's JSON."""
    out = str(tmp_path / "scores.json")
    score.main(["--ckpt", ckpt, "--data", folder, "--device", "cpu", "--out", out, *more])
    with open(out) as f:
        return json.load(f)["loss"]


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


@pytest.mark.parametrize("count", [2, 64, 65, 66, 129])
def test_every_token_but_the_first_is_a_target_once(tmp_path, count):
    folder = write_data(tmp_path / "data", val=count)
    whole = score.SplitWindows(data.Tokens(folder, "val"), 64, 2)
    batches = [whole.batch(g) for g in range(whole.n_groups)]
    ids = data.Tokens(folder, "val").read(0, count)
    assert torch.cat([windows[:, 1:].flatten() for windows in batches]).tolist() == ids[1:].tolist()
    assert torch.cat([windows[:, :-1].flatten() for windows in batches]).tolist() == ids[:-1].tolist()
    assert all(windows.size(1) > 1 for windows in batches)


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


def test_shares_add_up(ckpt, tmp_path):
    """What several ranks compute of the sum is the sum, each group in its place."""
    folder = write_data(tmp_path / "data")
    whole = score.SplitWindows(data.Tokens(folder, "val"), 64, 1)
    model, cpu = GPT.from_pretrained(ckpt).eval(), torch.device("cpu")

    class Share:
        def __init__(self, rank, world):
            self.rank, self.world, self.is_first = rank, world, rank == 0

        def sum(self, sums, device):
            self.sums = sums
            return sums

    shares = [Share(rank, 3) for rank in range(3)]
    for share in shares:
        score.total_nats(model, whole, share, cpu, torch.float32)
    one = score.total_nats(model, whole, Ranks(), cpu, torch.float32)
    assert sum(share.sums for share in shares).sum().item() == one


@pytest.mark.slow
def test_torchrun_gives_the_same_number(ckpt, tmp_path):
    folder, _ = write_text(tmp_path / "data", [TEXT] * 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["score.py", "--ckpt", ckpt, "--data", folder, "--device", "cpu", "--batch_size", "2"]
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--out", str(tmp_path / "two.json")], check=True, **options)
    assert done.stdout.count("nats/token") == 1
    with open(tmp_path / "two.json") as f:
        assert json.load(f)["loss"] == scored(ckpt, folder, tmp_path, "--batch_size", "2")
    done = subprocess.run([*command, "--split", "test"], **options)
    assert done.returncode and done.stderr.count("score.py: ") == 1
    assert "has no test split" in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks=,"], "nothing to score"),
        (["--data=DATA", "--include_path=."], "belong to --tasks"),
        (["--tasks=piqa", "--include_path=/nowhere"], "no folder '/nowhere'"),
        (["--tasks=piqa", "--block_size=8"], "belongs to --data"),
        (["--data=DATA", "--block_size=65"], "reads at most 64 tokens"),
        (["--data=SHORT"], "val has 1 tokens; a loss needs two"),
    ],
)
def test_refusals(ckpt, tmp_path, argv, message):
    folders = {"DATA": write_data(tmp_path / "data"), "SHORT": write_data(tmp_path / "short", val=1)}
    for name, folder in folders.items():
        argv = [a.replace(f"={name}", f"={folder}") for a in argv]
    assert message in refusal(score.main, ["--ckpt", ckpt, *argv])


def test_a_model_of_nans_is_one_line(tmp_path):
    folder, _ = write_text(tmp_path / "data", [TEXT])
    model = write_checkpoint(tmp_path / "a")
    state = {name: t * 1e30 for name, t in hf_state(model).items()}
    os.mkdir(tmp_path / "b")
    write_model(tmp_path / "b", model, state)
    assert "the loss is nan" in refusal(score.main, ["--ckpt", str(tmp_path / "b"), "--data", folder])


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
ROLLING = """task: toy_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/toy.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte}
  - {metric: word_perplexity}
"""


@pytest.fixture
def toy(tmp_path):
    """A folder with two tasks on forty questions, some longer than the model's 64 positions."""
    rng = np.random.default_rng(0)
    words = ["the", "fox", "dog", "é", "<|endoftext|>", "jumps\n", "over", "lazy", "quick", "😀", "one"]
    with open(tmp_path / "toy.jsonl", "w") as f:
        for i in range(40):
            question = " ".join(rng.choice(words, 4 + i // 2))
            choices = [" ".join(rng.choice(words, n)) for n in (1, 2, 3)]
            row = {"question": question, "choices": choices, "answer": int(rng.integers(3))}
            f.write(json.dumps(row) + "\n")
    (tmp_path / "choice.yaml").write_text(CHOICE.replace("FOLDER", str(tmp_path)))
    (tmp_path / "rolling.yaml").write_text(ROLLING.replace("FOLDER", str(tmp_path)))
    return tmp_path


@pytest.mark.slow
def test_tasks_are_what_lm_eval_says_by_hand(ckpt, toy, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-extra.txt")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(toy / "cache"))
    asked = ["--tasks", "toy_choice,toy_rolling", "--include_path", str(toy), "--device", "cpu"]
    asked += ["--batch_size", "4"]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", *asked, "--model_args"]
    command += [f"pretrained={ckpt},dtype=float32", "--output_path", str(toy / "by_hand")]
    subprocess.run(command, cwd=toy, check=True, capture_output=True)
    (by_hand,) = (toy / "by_hand").rglob("results_*.json")
    by_hand = json.loads(by_hand.read_text())["results"]
    score.main(["--ckpt", ckpt, *asked, "--out", str(toy / "scores.json")])
    ours = json.loads((toy / "scores.json").read_text())["tasks"]
    for task in ("toy_choice", "toy_rolling"):
        assert ours["results"][task] == by_hand[task]
    table = capsys.readouterr().out  # lm_eval's own
    assert "toy_choice" in table and "word_perplexity" in table


@pytest.mark.slow
def test_a_limit_no_tokenizer_files_and_an_unknown_task(ckpt, toy, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-extra.txt")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(toy / "cache"))
    argv = ["--tasks", "toy_rolling", "--include_path", str(toy), "--limit", "3", "--device", "cpu"]
    score.main(["--ckpt", ckpt, *argv, "--out", str(toy / "scores.json")])
    found = json.loads((toy / "scores.json").read_text())["tasks"]
    assert found["n-samples"]["toy_rolling"]["effective"] == found["limit"] == 3
    write_checkpoint(tmp_path / "bare", block_size=64)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.unlink(tmp_path / "bare" / file)
    assert "has no tokenizer files" in refusal(score.main, ["--ckpt", tmp_path / "bare", *argv])
    said = refusal(score.main, ["--ckpt", ckpt, "--tasks", "arc_eazy"])
    assert "lm_eval knows no task 'arc_eazy' (did you mean arc_easy?)" in said
