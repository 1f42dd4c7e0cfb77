"""What training costs, by formula. python -m pytest tests/training/test_cost.py"""

import os

import pytest
import torch

import train
from inheritune.training import cost
from inheritune.training.cost import costs, training_memory
from model import GPT
from tests.tiny import ROOT, tiny_config


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "sizes", [{}, {"n_layer": 1, "n_embd": 10, "block_size": 3}, {"vocab_size": 7, "n_vocab": 7}]
)
def test_parameters_are_those_of_the_model(bias, sizes):
    config = tiny_config(bias=bias, **sizes)
    assert costs(config)[0] == GPT(config).num_params()


@pytest.mark.parametrize("bias", [True, False])  # biases are no matrix products
def test_flops_against_a_hand_count(bias):
    # blocks 2 x 12 x 12^2 = 3,456, head 320 x 12 = 3,840, times 6: 43,776; attention 12 x 2 x 12 x 16 = 4,608
    assert costs(tiny_config(block_size=16, n_layer=2, n_embd=12, bias=bias))[1] == 43_776 + 4_608


def test_mfu_is_the_share_of_all_devices_peak(monkeypatch):
    config, device = tiny_config(), torch.device("cpu")
    assert cost.mfu(1000.0, config, device, 2) is None
    monkeypatch.setattr(cost, "peak_flops", lambda device: 1e12)
    assert cost.mfu(1000.0, config, device, 2) == pytest.approx(1000 * costs(config)[1] / 2e12)


def total(*arguments, **named):
    return sum(training_memory(*arguments, **named).values())


def test_the_estimate_of_memory_counts_what_there_is():
    """By hand, for sizes that make one part or another the largest. bench/memory.py holds it against real
    steps."""
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
    again = total(
        large, 5, 2, half=False, checkpoint_activations="full"
    )  # of the last block, more than logits
    assert again == 16 * GPT(large).num_params() + 4 * 16 * 32 + full + rows * 32 * 64
    short = tiny_config(n_layer=2, n_embd=32, vocab_size=1000, block_size=4, bias=False)
    assert total(short, 1, 1, half=False) == 16 * GPT(short).num_params() + 2 * embedding
    block = 4 * (12 * 32 * 32 + 2 * 32)
    gathered = 2 * (embedding + 2 * block)
    assert total(c, 5, 2, half=False, shards=4) == 4 * n + gathered + none + logits


def test_the_terms_of_memory_have_names():
    c = tiny_config(n_layer=2, n_embd=32, vocab_size=1000, block_size=64, bias=False)
    n = GPT(c).num_params()
    terms = training_memory(c, 5, 2, half=False)
    assert list(terms) == ["weights", "moments", "gradients", "activations", "logits"]
    assert (terms["weights"], terms["moments"], terms["gradients"]) == (4 * n, 8 * n, 4 * n)


def test_without_torchs_chunked_loss_all_logits_count(monkeypatch):
    c = tiny_config(vocab_size=1000)
    monkeypatch.setattr(cost, "CHUNKED_LOSS", False)
    assert training_memory(c, 100, 1, half=False)["logits"] == 100 * 8 * 1000 * 12


def test_gpt2_xl_fits_eight_cards_of_40_gb_in_shards(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    said = {}
    for more in (["--shard"], ["--batch_size=4"]):
        train.main([os.path.join(ROOT, "config/train_gpt2_xl.py"), "--dry_run", *more])
        said[more[0]] = capsys.readouterr().out
        assert "GB on each of 8 with shard=True" in said[more[0]]
    assert "does not fit" not in next(line for line in said["--shard"].splitlines() if "A100" in line)
    assert "does not fit 40 GB: shard=True, or lower batch_size" in said["--batch_size=4"]
