"""What training costs, by formula."""

import re

import pytest
import torch

import train
from inheritune.training import cost, logs
from inheritune.training.cost import flops_with_teacher, training_memory
from inheritune.training.planning import Plan
from inheritune.training.settings import TrainSettings
from model import GPT
from tests.tiny import tiny_config


@pytest.mark.parametrize("changes", [{}, {"n_layer": 1, "n_embd": 10, "block_size": 3, "bias": False}])
def test_parameters_are_those_of_the_model(changes):
    assert tiny_config(**changes).num_params == GPT(tiny_config(**changes)).num_params()


@pytest.mark.parametrize("bias", [True, False])  # biases are no matrix products
def test_flops_against_a_hand_count(bias):
    # blocks 2 x 12 x 12^2 = 3,456, head 320 x 12 = 3,840, times 6: 43,776; attention 12 x 2 x 12 x 16 = 4,608
    assert tiny_config(block_size=16, n_layer=2, n_embd=12, bias=bias).flops_per_token == 43_776 + 4_608


def test_mfu_is_the_share_of_all_devices_peak(monkeypatch):
    monkeypatch.setattr(logs, "peak_flops", lambda device: 1e12)
    recorder = logs.Recorder(TrainSettings(), 3e6, torch.device("cpu"), 2)
    assert recorder.peak == pytest.approx(2e12 / 3e6)  # tokens/s


def test_a_dry_run_says_on_how_many_gpus_a_model_fits(capsys, monkeypatch):
    """DDP's second step takes 4 bytes a parameter more than one GPU does."""
    train.main(["config/train_gpt2_xl.py", "--dry_run"])
    text = capsys.readouterr().out
    assert re.search(r"A100 40GB .* days on 1, +too large on 8", text)
    train.main(["config/train_gpt2_xl.py", "--dry_run", "--shard=True"])
    alone = capsys.readouterr().out
    assert re.search(r"A100 40GB .* days on 1, .* days on 8", alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.main(["config/train_gpt2_xl.py", "--dry_run", "--shard=True"])
    of_two = capsys.readouterr().out
    assert "too large on 2\n" in of_two and "on 8" not in of_two
    assert re.search(r"about .* one GPU", of_two)[0] == re.search(r"about .* one GPU", alone)[0]


def test_a_teachers_forward_pass_costs_a_third_in_the_students_context():
    config, teacher = tiny_config(block_size=16), tiny_config(n_layer=5, block_size=64)
    read = tiny_config(n_layer=5, block_size=16).flops_per_token
    assert flops_with_teacher(config, teacher) == pytest.approx(config.flops_per_token + read / 3)


def memory(config, micro_batch, accumulation, half, shards=1, teacher=None, ranks=1, **settings):
    plan = Plan(ranks, config, teacher, micro_batch=micro_batch, accumulation=accumulation)
    settings = {"dtype": "bfloat16" if half else "float32", "compile": False} | settings
    return training_memory(plan, TrainSettings(**settings), shards)


def total(*arguments, **named):
    return sum(memory(*arguments, **named).values())


def test_the_estimate_of_memory_counts_what_there_is(monkeypatch):
    """By hand, for sizes that make one part or another the largest (real steps: bench/memory.py)."""
    monkeypatch.setattr(cost, "CHUNKED_LOSS", True)
    c = tiny_config(n_layer=2, n_embd=32, vocab_size=1000, block_size=64, bias=False)
    n, rows, embedding = GPT(c).num_params(), 64 * 5, 4 * 1000 * 32
    none, cheap, full = (2 * rows * 32 * size for size in (64, 40, 4))
    logits = rows * 1000 * 8 + embedding  # which are a chunk, with its gradient and the head's
    assert total(c, 5, 1, half=False) == 12 * n + none + logits
    assert total(c, 5, 2, half=False) == 16 * n + none + logits
    assert total(c, 5, 2, half=True) == 18 * n + 2 * rows * 32 * (8 + 14 * 2) + rows * 1000 * 12
    assert total(c, 20, 2, half=False) == 16 * n + 4 * none + 512 * 1000 * 8 + embedding
    assert total(c, 5, 2, half=False, checkpoint_activations="cheap") == 16 * n + cheap + logits
    assert total(c, 5, 2, half=False, checkpoint_activations="full") == 16 * n + full + logits
    large = tiny_config(n_layer=2, n_embd=32, vocab_size=16, n_vocab=16, block_size=64, bias=False)
    again = total(large, 5, 2, half=False, checkpoint_activations="full")  # the last block, not logits
    assert again == 16 * GPT(large).num_params() + 4 * 16 * 32 + full + rows * 32 * 64
    short = tiny_config(n_layer=2, n_embd=32, vocab_size=1000, block_size=4, bias=False)
    assert total(short, 1, 1, half=False) == 16 * GPT(short).num_params() + 2 * embedding
    block = 4 * (12 * 32 * 32 + 2 * 32)
    gathered = embedding + 2 * block + embedding  # weights, and the head's gradient
    assert total(c, 5, 2, half=False, shards=4) == 4 * n + gathered + none + logits
    narrow, gathered = 2 * rows * 32 * (2 + 14) * 2, gathered / 2
    for compiled, each in ((False, 12), (True, 2)):
        found = memory(c, 5, 2, half=True, shards=4, compile=compiled)
        assert sum(found.values()) - found["logits"] == 4 * n + gathered + narrow
        assert found["logits"] == rows * 1000 * each


def test_the_estimate_counts_what_is_compiled_the_teacher_and_ranks():
    c = tiny_config(n_layer=2, n_embd=32, vocab_size=1000, block_size=64, bias=False)
    t = tiny_config(n_layer=5, n_embd=48, vocab_size=1008, block_size=64, bias=False)
    n, m, logits = GPT(c).num_params(), GPT(t).num_params(), 64 * 5 * 1000
    kept, kept16 = (2 * 64 * 5 * 32 * size for size in (64, 8 + 14 * 2))
    assert total(c, 5, 1, half=False, compile=True) == 12 * n + kept + 4 * logits, "all logits, no chunks"
    assert total(c, 5, 1, half=True, compile=True) == 14 * n + kept16 + 2 * logits
    assert total(c, 5, 1, half=False, ranks=2) == total(c, 5, 2, half=False)
    moments = memory(c, 5, 1, half=False, optimizer="muon")["moments"]
    assert moments == 4 * (12 * 2 * 32 * 32 + 2 * 2 * 32) + 8 * (1000 + 64 + 1) * 32, "of the blocks one"
    for half, compiled, each in (
        *((False, False, 32), (True, False, 28)),
        *((False, True, 12), (True, True, 8)),
    ):
        terms = memory(c, 5, 1, half=half, compile=compiled, teacher=t)
        assert terms["logits"] == each * logits
        assert terms["teacher"] == (2 * m + 4 * 1008 * 48 if half else 4 * m)


def test_a_dry_run_counts_the_teacher(capsys):
    """In FLOPs, and so in time, and in memory; and a CPU's step is neither in 16 bits nor compiled."""
    said = {}
    for more in ([], ["--teacher=gpt2-xl"], ["--device=cpu"], ["--device=cpu", "--compile=True"]):
        train.main(["--init_from=gpt2", "--batch_tokens=12288", "--max_iters=10", "--dry_run", *more])
        out = capsys.readouterr().out
        flops = float(re.search(r"compute +(\S+) FLOPs", out)[1])
        said[" ".join(more)] = flops, float(re.search(r"logits (\S+?)[,\n]", out)[1])
        assert ("teacher 3." in out) == ("--teacher=gpt2-xl" in more)
    assert said["--teacher=gpt2-xl"][0] > 4 * said[""][0]
    rows = 12288 * 50257 / 1e9
    chunk = 12 * rows if not cost.CHUNKED_LOSS else 0.4
    found = [logits for _, logits in said.values()]
    assert found == pytest.approx([2 * rows, 8 * rows, chunk, 4 * rows], abs=0.06)


def test_without_torchs_chunked_loss_all_logits_count(monkeypatch):
    c = tiny_config(vocab_size=1000)
    monkeypatch.setattr(cost, "CHUNKED_LOSS", False)
    assert memory(c, 100, 1, half=False)["logits"] == 100 * 8 * 1000 * 12
