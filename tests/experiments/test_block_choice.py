"""Which blocks to keep, against transformers' own hidden states and losses."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional as F

from inheritune.experiments import attention_metrics, block_choice
from inheritune.experiments.block_choice import RULES, choice_flops, choose_kept
from inheritune.models.open_model import load_model, open_config
from model import GPT
from tests import other_models
from tests.tiny import write_data

IDX = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(3))
TARGETS = IDX.roll(-1, 1)


@pytest.fixture(params=["llama", "gpt2"], scope="module")
def pair(request, tmp_path_factory):
    """(transformers' model, ours)."""
    folder = tmp_path_factory.mktemp("choice") / request.param
    changes = {"depth": 5, "activation_function": "gelu_new", "n_inner": None}  # what model.py implements
    theirs = other_models.build(request.param, **(changes if request.param == "gpt2" else {}))
    theirs.save_pretrained(folder)
    ours = load_model(str(folder))
    assert (type(ours) is GPT) == (request.param == "gpt2")
    return theirs, ours


def stream(theirs):
    """What enters each block, and what leaves the last one, before the final norm."""
    found = []
    (blocks,) = (m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [b.register_forward_hook(lambda _m, _a, out: found.append(out)) for b in blocks]
    with torch.no_grad():
        first = theirs(IDX, output_hidden_states=True).hidden_states[0]
    for hook in hooks:
        hook.remove()
    return [first, *(x[0] if isinstance(x, tuple) else x for x in found)]


def turned(x, y):
    return (1 - F.cosine_similarity(x, y, dim=-1)).mean().item()


def test_influence_keeps_the_blocks_that_turn_most(pair):
    theirs, ours = pair
    x = stream(theirs)
    influence = [turned(a, b) for a, b in itertools.pairwise(x)]
    for k in (1, 2, 3):
        wanted = sorted(sorted(range(len(influence)), key=lambda i: -influence[i])[:k])
        assert RULES["influence"](ours, IDX, TARGETS, k) == wanted


def test_consecutive_removes_those_that_turn_least_together(pair):
    theirs, ours = pair
    x, n = stream(theirs), ours.config.n_layer
    for k in (2, 3):
        spans = [range(i, i + n - k) for i in range(n) if i + n - k <= n - 2]  # the last two stay
        least = min(spans, key=lambda span: turned(x[span[0]], x[span[-1] + 1]))
        assert RULES["consecutive"](ours, IDX, TARGETS, k) == [i for i in range(n) if i not in least]
    assert len(RULES["consecutive"](ours, IDX, TARGETS, 1)) == 1


def test_greedy_removes_what_costs_least(pair):
    theirs, ours = pair
    kept = list(range(ours.config.n_layer))
    while len(kept) > 2:
        losses = {}
        for i in kept:
            logits = other_models.without(theirs, [j for j in kept if j != i], IDX)
            losses[i] = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten()).item()
        kept.remove(min(losses, key=losses.get))
        assert RULES["greedy"](ours, IDX, TARGETS, len(kept)) == kept


def test_the_choice_is_made_on_training_data_and_has_a_cost(tmp_path, monkeypatch):
    other_models.build("llama").save_pretrained(tmp_path / "ckpt")
    data, seen = write_data(tmp_path / "data"), []
    opened = lambda *a: seen.append(a) or (load_model(a[0]), IDX, TARGETS)  # noqa: E731
    monkeypatch.setattr(attention_metrics, "open_with_windows", opened)
    assert len(choose_kept("greedy", str(tmp_path / "ckpt"), data, 2)) == 2
    assert seen == [(str(tmp_path / "ckpt"), data, "train", block_choice.CHOICE_WINDOWS)]
    config = open_config(str(tmp_path / "ckpt"))
    tokens = block_choice.CHOICE_WINDOWS * config.block_size
    one = {d: config.with_blocks(list(range(d))).flops_per_token / 3 * tokens for d in (1, 2, 3, 4)}
    one[0] = 2 * one[1] - one[2]  # the head alone
    assert choice_flops("influence", config, 2) == pytest.approx(one[4])
    assert choice_flops("greedy", config, 2) == pytest.approx(
        sum(one[d] for d in (4, 0, 1, 2, 3, 3, 0, 1, 2))
    )
    longer, window = (dataclasses.replace(config, limit=1000, block_size=T) for T in (500, 100))
    assert choice_flops("greedy", longer, 2) == choice_flops("greedy", window, 2), "windows have 100 tokens"
