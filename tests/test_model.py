"""The model against transformers' GPT-2: its initialisation, its loss, and sampling with the cache."""

import collections
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from inheritune.weights import gpt2_format
from model import CHUNKED_LOSS, GPT, KVCache, next_token
from tests.tiny import gpt2, same_weights, tiny_config, tiny_model, write_checkpoint

SHAPES = [
    dict(n_layer=2, n_head=1, n_embd=7, block_size=7, vocab_size=101, n_vocab=101),
    dict(n_layer=3, n_head=3, n_embd=15, block_size=33, vocab_size=65, n_vocab=65),
    dict(n_layer=4, n_head=5, n_embd=20, block_size=33, vocab_size=67, n_vocab=60),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_transformers(shape, bias):
    model = tiny_model(bias=bias, eot=0, scale_attn_by_inverse_layer_idx=shape["n_layer"] == 4, **shape)
    reference = gpt2(model)
    for T in (1, shape["block_size"] - 2, shape["block_size"]):
        idx = torch.randint(shape["vocab_size"], (3, T))
        torch.testing.assert_close(model(idx), reference(idx).logits, rtol=0, atol=1e-5)
    targets = torch.randint(shape["vocab_size"], idx.shape)
    model(idx, targets).backward()
    F.cross_entropy(reference(idx).logits.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        grad = theirs[name].grad.t() if name.endswith(gpt2_format.INPUT_FIRST) else theirs[name].grad
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_loss_is_the_fp32_mean_cross_entropy_whatever_the_autocast(dtype):
    model = tiny_model()
    idx, targets = torch.randint(320, (2, 3, 8)).unbind(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss, logits = model(idx, targets), model(idx)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert logits.dtype == (dtype or torch.float32) and logits.shape == (3, 8, 320)
    p = logits.detach().double().softmax(-1).numpy().reshape(-1, 320)  # of the very logits it had
    by_hand = -np.log(p[np.arange(24), targets.flatten().numpy()]).mean()
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def largest_kept(work):
    """The number of elements of the largest tensor that autograd keeps while work() runs."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        work()
    return max(sizes)


def test_the_loss_in_chunks_is_the_loss_of_whole_logits():
    model = tiny_model(block_size=64)
    idx, targets = torch.randint(257, (2, 18, 64)).unbind(0)  # 1,152 rows: two chunks and a part of one
    model(idx, targets).backward()
    chunked = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    whole = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    whole.backward()
    assert model(idx, targets).item() == pytest.approx(whole.item(), rel=1e-6)
    with torch.inference_mode():
        assert model(idx, targets).item() == pytest.approx(whole.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(chunked[name], p.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.skipif(not CHUNKED_LOSS, reason="torch before 2.13 has no linear_cross_entropy")
def test_the_loss_in_chunks_keeps_no_logits():
    model = tiny_model(block_size=64)
    idx, targets = torch.randint(257, (2, 18, 64)).unbind(0)
    assert largest_kept(lambda: model(idx, targets)) < 1152 * 320 // 2
    assert largest_kept(lambda: F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())) == 1152 * 320


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_checkpointed_activations_change_no_bit_of_loss_and_gradients(dropout, bias):
    model = tiny_model(n_layer=6, dropout=dropout, bias=bias).train()
    idx, targets = torch.randint(257, (2, 4, 8)).unbind(0)
    results = {}
    for model.checkpoint_activations in ("none", "cheap", "full"):
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(idx, targets)
        loss.backward()
        results[model.checkpoint_activations] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for recompute in ("cheap", "full"):
        assert all(torch.equal(a, b) for a, b in zip(results["none"], results[recompute], strict=True))


class CountOps(TorchDispatchMode):
    """Counts how often each of torch's operations is computed."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.name()] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
def test_cheap_recomputes_norms_and_gelu_and_nothing_expensive(bias):
    """In the backward pass; "full" recomputes all but each block's last product."""
    model = tiny_model(n_layer=3, bias=bias).train()
    idx, targets = torch.randint(257, (2, 4, 8)).unbind(0)
    counts = {}
    for model.checkpoint_activations in ("none", "cheap", "full"):
        with CountOps() as ops:
            model(idx, targets).backward()
        product = "aten::addmm" if bias else "aten::mm"
        attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
        norm, gelu = "aten::native_layer_norm", "aten::gelu"
        counts[model.checkpoint_activations] = [ops.counts[op] for op in (product, attention, norm, gelu)]
    products, *others = counts["none"]
    assert others == [3, 7, 3]
    assert counts["cheap"] == [products, 3, 7 + 6, 6]
    assert counts["full"] == [products + 3 * 3, 6, 7 + 6, 6]


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(tiny_config(n_embd=128, n_layer=8, n_head=4, block_size=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 20, name


def test_the_head_is_tied_and_the_state_dict_holds_no_buffers():
    model = GPT(tiny_config())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not list(model.buffers())
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()} | {"lm_head.weight"}
    assert model.num_params() == sum(p.numel() for p in model.parameters())


def test_a_model_that_is_read_is_not_drawn_first(tmp_path):
    """(Random weights take half a minute in XL's size, on every rank.) Its head is tied all the same."""
    written = write_checkpoint(tmp_path / "a", bias=False)
    before = torch.get_rng_state()
    model = GPT.from_pretrained(str(tmp_path / "a"))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.lm_head.weight is model.transformer.wte.weight and model.training
    assert same_weights(model, written) and all(p.requires_grad for p in model.parameters())


# Sampling


def generate(model, idx, count, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(model.generate(idx, count, generator=generator, **options)), dim=1)


@pytest.mark.parametrize("block_size", [1, 7, 8])
@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=0.7, top_k=40), dict(top_p=0.8)])
def test_cached_ids_are_the_uncached_ones_also_beyond_block_size(options, block_size):
    model = tiny_model(block_size=block_size, eot=300)  # nothing ends a text
    for T in (1, block_size, 2 * block_size + 1):
        idx = torch.randint(257, (3, T))
        assert torch.equal(generate(model, idx, 30, **options), generate_uncached(model, idx, 30, **options))


@torch.no_grad()
def generate_uncached(model, idx, count, **options):
    """The whole context read again for every token; half of it dropped when it is full."""
    generator, ids = torch.Generator().manual_seed(0), []
    context = idx[:, -model.config.block_size :]
    for _ in range(count):
        if context.size(1) > model.config.block_size:
            context = context[:, -max(1, model.config.block_size // 2) :]
        logits = model(context)[:, -1, : model.config.n_vocab]
        ids.append(next_token(logits, generator=generator, **options))
        context = torch.cat((context, ids[-1][:, None]), dim=1)
    return torch.stack(ids, dim=1)


def test_what_does_not_fit_the_context_or_the_cache_is_an_error():
    model = tiny_model(block_size=8)
    with pytest.raises(ValueError, match="9 tokens do not fit block_size 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = KVCache(model.config, 1, 8, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.hidden(torch.zeros(1, 3, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="one more at a time"):
            model.hidden(torch.zeros(1, 2, dtype=torch.long), cache)


def test_the_cache_spares_reading_what_was_read(monkeypatch):
    read, hidden = [], GPT.hidden
    noted = lambda self, idx, cache=None: read.append(idx.size(1)) or hidden(self, idx, cache)  # noqa: E731
    monkeypatch.setattr(GPT, "hidden", noted)
    generate(tiny_model(eot=300), torch.randint(256, (1, 3)), 4, temperature=0)
    assert read == [3, 1, 1, 1]


def test_generation_streams_and_makes_no_more_than_asked():
    steps = tiny_model().generate(torch.zeros(2, 1, dtype=torch.int64), 5, temperature=0)
    assert next(steps).shape == (2,)
    assert len(list(steps)) == 4
    assert list(tiny_model().generate(torch.zeros(2, 1, dtype=torch.int64), 0)) == []


def test_a_row_stops_at_its_end_of_text_and_all_together_end():
    model = tiny_model(n_vocab=4, eot=3)
    ids = generate(model, torch.zeros(4, 1, dtype=torch.int64), 200)
    ends = [row.tolist().index(3) for row in ids]
    assert len(set(ends)) > 1, "the test needs rows of different lengths"
    for row, end in zip(ids, ends, strict=True):
        assert (row[end:] == 3).all() and (row[:end] != 3).all()
    assert ids.size(1) == max(ends) + 1


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn():
    model = tiny_model(n_vocab=5, eot=4)
    with torch.no_grad():  # the padded rows win every comparison but must not be seen
        model.transformer.wte.weight[5:] = 50 * model.transformer.ln_f.bias
    for options in (dict(temperature=0), dict(temperature=5.0), dict(top_k=9), dict(top_p=0.9)):
        assert generate(model, torch.zeros(50, 1, dtype=torch.int64), 8, **options).max() < 5


def allowed(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution that sampling must have, in numpy, written from the definition."""
    p = np.exp((logits - logits.max()) / temperature)
    order, kept, mass = np.argsort(-p)[:top_k], np.zeros_like(p), 0.0
    p /= p[order].sum()
    for i in order:  # the fewest likeliest ids whose mass reaches top_p
        if top_p is None or mass < top_p:
            kept[i] = p[i]
        mass += p[i]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 99])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.6, 1.0])
def test_sampling_follows_the_definition_of_top_k_and_top_p(temperature, top_k, top_p):
    logits = np.array([0.1, 2.0, -1.0, 1.5, 0.9, -3.0, 1.2])
    many = torch.tensor(logits, dtype=torch.float32).expand(20_000, -1)
    drawn = next_token(many, temperature, top_k, top_p, torch.Generator().manual_seed(0)).numpy()
    share = np.bincount(drawn, minlength=7) / len(drawn)
    expected = allowed(logits, temperature, top_k, top_p)
    assert not share[expected == 0].any()
    np.testing.assert_allclose(share, expected, atol=0.015)
