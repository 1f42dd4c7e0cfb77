"""What the compiler is given: whole static graphs, few of them, none anew after the first step."""

import collections
import functools

import numpy as np
import pytest
import torch

import model
import train
from model import GPT, GPTConfig
from tests.other_models import build
from tests.tiny import arguments, column

# validation comes first, in groups of 4 windows and a last one of 3; two micro-batches of 4 a step
STEPS = {"max_iters": 4, "eval_interval": 2, "eval_tokens": 8 * 27, "lr_decay_iters": 12}


def symbols(graph):
    """How many sizes in a graph are no numbers but symbols, which may change from call to call."""
    return sum(isinstance(node.meta.get("example_value"), torch.SymInt) for node in graph.graph.nodes)


@pytest.mark.parametrize(
    "kind, backend",
    [
        ("", "aot_eager"),
        pytest.param("", "inductor", marks=pytest.mark.slow),
        *(pytest.param(kind, "aot_eager", marks=pytest.mark.slow) for kind in ("llama", "gemma2")),
    ],
)
def test_the_compiled_step_is_one_static_graph(data, tmp_path, monkeypatch, kind, backend):
    """fullgraph raises where the compiler would go back to Python."""
    found, counts, step = [], [], train.train_step
    options = STEPS
    if kind:
        build(kind).save_pretrained(tmp_path / kind)
        options = STEPS | dict.fromkeys(("n_layer", "n_head", "n_embd"))
        options |= {"init_from": tmp_path / kind, "inherit_layers": 2}

    def noting(graph, inputs):
        found.append(symbols(graph))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=noting, fullgraph=True))
    monkeypatch.setattr(train, "train_step", lambda run: step(run) or counts.append(len(found)))
    torch._dynamo.reset()
    train.main(arguments(data, tmp_path / "compiled", **options, compile=True))
    assert found == [0, 0, 0], "two validation groups, the step; no symbols"
    assert counts == [3] * 4, "nothing is compiled after step 1"
    train.main(arguments(data, tmp_path / "plain", **options))
    for name in ("loss", "val_loss", "grad_norm"):
        found, expected = (column(tmp_path / run, name) for run in ("compiled", "plain"))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("scaled", "graphs"), [(False, 3), (True, 3 * 12)], ids=["alike", "scaled"])
def test_a_sharded_model_is_compiled_block_by_block(forks, data, tmp_path, scaled, graphs):
    """Blocks that are alike share their graphs: two validation groups, the step. torch itself stops after
    eight graphs of the same code."""
    code = f"""
    import functools, torch
    from tests.training.test_compile import symbols
    graphs = []
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    backend = lambda graph, inputs: graphs.append(symbols(graph)) or graph
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    def checked(run):
        step(run)
        assert graphs == [0] * {graphs}, graphs
    train.train_step = checked
    """
    argv = arguments(data, tmp_path / "a", **STEPS, n_layer=12, shard=True, compile=True)
    argv += ["--scale_attn_by_inverse_layer_idx=True"] * scaled
    assert forks.train(argv, world=2, code=code)[0] == 0, forks.printed


@pytest.mark.slow
def test_a_compiled_block_keeps_its_products_too(monkeypatch):
    """With shards each block is compiled alone: what "cheap" keeps must be decided inside of it. (From
    outside the products of the compiled code go by other names and were computed again.)"""
    decided, keep = collections.Counter(), model.keep_products

    def noting(context, op, *args, **kwargs):
        policy = keep(context, op, *args, **kwargs)
        decided[str(op), policy.name] += 1
        return policy

    monkeypatch.setattr(model, "keep_products", noting)
    idx = torch.randint(60, (2, 32))
    grads, counts = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=64, bias=False))
        module.checkpoint_activations = "cheap"
        if compiled:
            torch._dynamo.reset()
            module.transformer.h[0].compile(dynamic=False)
        decided.clear()
        module(idx, idx).backward()
        grads.append([p.grad for p in module.parameters()])
        counts.append({op for op, policy in decided if policy == "MUST_SAVE"})
        assert not any("mm.out" in op for op, _ in decided)
    assert counts[0] == counts[1] and any("mm" in op for op in counts[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
