"""The analysis against numpy and transformers."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from inheritune.data.reader import Tokens
from inheritune.experiments import attention_metrics
from tests.tiny import gpt2, tiny_model, write_data

T = 100


def rank(A, tau=0.9):
    """k*(tau) of one matrix, by numpy's SVD."""
    s = np.linalg.svd(np.asarray(A, dtype=np.float64), compute_uv=False) ** 2
    if not s.any():
        return 0
    return int(np.searchsorted(np.cumsum(s) / s.sum(), tau - 1e-6)) + 1


def mass(A, eta=0.9):
    """m*(eta) of one matrix, by numpy."""
    share = np.sort((np.asarray(A, dtype=np.float64) ** 2).sum(0))[::-1]
    return int(np.searchsorted(np.cumsum(share) / share.sum(), eta - 1e-6)) + 1


def no_column_0(A):
    return np.concatenate([np.zeros_like(A[:, :1]), A[:, 1:]], axis=1)


def row_entropy(A):
    """Mean over rows of −Σ p ln p, by numpy."""
    A = np.asarray(A, dtype=np.float64)
    return float(-(A * np.log(np.where(A > 0, A, 1))).sum(-1).mean())


# of one matrix, by numpy
MEASURED = {"rank_0.9": rank, "rank_0.8": lambda A: rank(A, 0.8), "mass": mass, "entropy": row_entropy}
MEASURED |= {"rank_without_first": lambda A: rank(no_column_0(A)), "sink": lambda A: A[:, 0].mean()}


def assert_agrees(found, out):
    """What measure_layers found is what numpy makes of transformers' own attentions and hidden states."""
    heads, influence, norms = found
    assert heads.keys() - {"rest"} == MEASURED.keys()
    for name, f in MEASURED.items():
        for layer, A in enumerate(out.attentions):  # (B, nh, T, T)
            expected = [np.mean([f(a) for a in A[:, h].numpy()]) for h in range(A.size(1))]
            assert heads[name][layer].tolist() == pytest.approx(expected, abs=1e-4)
    hidden = out.hidden_states[:-1]  # the last one has passed the final norm
    assert norms[:-1].tolist() == pytest.approx([x.norm(dim=-1).mean().item() for x in hidden], rel=1e-4)
    turned = [1 - F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(hidden)]
    assert influence[:-1].tolist() == pytest.approx(turned, abs=1e-4)


def patterns():
    """Attention patterns of which paper.md gives the values."""
    sink = torch.zeros(T, T)
    sink[:, 0] = 1
    previous = torch.eye(T).roll(1, dims=0)
    previous[0] = previous[1]  # position 0 has only itself
    return {
        "sink": sink,
        "uniform": torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None],
        "identity": torch.eye(T),
        "previous": previous,
    }


@pytest.mark.parametrize(
    "name, k, m", [("sink", 1, 1), ("uniform", 5, 30), ("identity", 90, 90), ("previous", 89, 89)]
)
def test_sanity_values_at_100_tokens(name, k, m):
    A = patterns()[name]
    assert torch.allclose(A.sum(-1), torch.ones(T))
    found = {what: value.item() for what, value in attention_metrics.measures(A[None], (0.9,)).items()}
    assert found["rank_0.9"] == k == rank(A)
    assert found["mass"] == mass(A)
    if name in ("sink", "uniform"):
        assert found["mass"] == m
    assert found["rank_without_first"] == rank(no_column_0(A))
    assert found["entropy"] == pytest.approx(row_entropy(A), abs=1e-5)
    assert found["sink"] == pytest.approx(float(A[:, 0].mean()), abs=1e-6)


def test_a_sink_hides_what_else_a_head_does():
    """(1 − w) sink + w identity has rank 1 up to w = 0.2, 35 at w = 0.3; without column 0 it shows."""
    sink, identity = patterns()["sink"], patterns()["identity"]
    found = attention_metrics.measures(torch.stack([(1 - w) * sink + w * identity for w in (0.1, 0.2, 0.3)]))
    assert found["rank_0.9"].tolist() == [1, 1, 35]
    assert min(found["rank_without_first"]) > 80


@pytest.mark.parametrize("scaled", [False, True])
def test_agrees_with_numpy_on_transformers_attention(scaled):
    model = tiny_model(n_layer=4, block_size=32, n_embd=32, n_head=4, scale_attn_by_inverse_layer_idx=scaled)
    with torch.no_grad():
        for block in model.transformer.h:  # attention that is not close to uniform
            block.attn.c_attn.weight.mul_(6)
    idx = torch.randint(0, 257, (7, 30), generator=torch.Generator().manual_seed(1))
    found = attention_metrics.measure_layers(model, idx, (0.9, 0.8))
    with torch.no_grad():
        assert_agrees(found, gpt2(model)(idx, output_attentions=True, output_hidden_states=True))
    assert len(found[0]["rank_0.9"].unique()) > 8  # the test would see a wrong head or layer


def test_bounded_memory_gives_the_same_numbers(monkeypatch):
    model, idx = tiny_model(), torch.randint(0, 257, (5, 8))
    whole = attention_metrics.measure_layers(model, idx)
    monkeypatch.setattr(attention_metrics, "ELEMENTS", 100)  # one window and one matrix at a time
    pieces = attention_metrics.measure_layers(model, idx)
    for name, values in whole[0].items():
        assert torch.allclose(values, pieces[0][name], atol=1e-6)
    assert torch.allclose(whole[1], pieces[1], atol=1e-6) and torch.allclose(whole[2], pieces[2], atol=1e-5)


def test_a_layer_is_lazy_however_many_windows_there_are(monkeypatch):
    """A mean of 100 ones is 1, also when they come one by one: 100 × 0.01 would add up to more."""
    monkeypatch.setattr(attention_metrics, "ELEMENTS", 1)
    monkeypatch.setattr(attention_metrics, "measures", lambda A, *_: {"rank_0.9": torch.ones(A.shape[:-2])})
    heads, *_ = attention_metrics.measure_layers(tiny_model(), torch.randint(0, 257, (100, 8)))
    assert (heads["rank_0.9"] == 1).all()


@pytest.mark.parametrize(
    "influence, blocks, most",
    [
        ([0.9, 0.1, 0.2, 0.3], [0, 3], "left out has 0.200"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [3, 4], "left out has 0.300"),
        ([0.2, 0.2, 0.2, 0.2], [0, 1], "0.200"),  # as deep as any other: the first ones
        ([0.7], [0], "of 1 blocks"),
    ],
)
def test_choice_of_blocks(influence, blocks, most):
    chosen, reason = attention_metrics.choose_by_influence(influence)
    assert chosen == blocks and most in reason


def test_groups():
    groups = attention_metrics.groups_of([8, 9, 10, 1, 2, 1.5, 1])
    assert [(g["first"], g["last"]) for g in groups] == [(0, 2), (3, 4), (5, 6)]
    assert [(g["avg_rank"], g["lazy"]) for g in groups] == [(9, False), (1.5, True), (1.25, True)]


def test_windows_are_random_places_of_the_split(tmp_path):
    data = write_data(tmp_path, val=600)
    idx, targets = attention_metrics.draw_windows(data, "val", 50, 12, seed=1)
    assert idx.shape == targets.shape == (50, 12) and idx.dtype == torch.int64
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    stream = Tokens(data, "val").read(0, 600)
    places = {tuple(stream[i : i + 12]) for i in range(589)}
    assert all(tuple(w) in places for w in idx.tolist())
    assert torch.equal(idx, attention_metrics.draw_windows(data, "val", 50, 12, seed=1)[0])
    assert not torch.equal(idx, attention_metrics.draw_windows(data, "val", 50, 12, seed=2)[0])
