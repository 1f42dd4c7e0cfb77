"""Each initialisation: exactly which tensors equal which, and that it trains.

pytest tests/models/test_initialisations.py
"""

import dataclasses
import json

import pytest
import torch

import inherit
import train
from inheritune.base.errors import UserError
from inheritune.models import initialisations
from inheritune.models.initialisations import PARTS, RECIPES, Recipe, assemble, choose_blocks
from inheritune.weights import checkpoint, gpt2_format
from model import GPT, GPTConfig
from tests.tiny import arguments, hf_state, tiny_config, tiny_model, write_checkpoint, write_data

OUTSIDE = (
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
)


@pytest.fixture(scope="module")
def reference():
    """(state dict, config) of a model with 6 blocks and 5 heads of 4 channels, every tensor random."""
    model = tiny_model(seed=5, n_layer=6, n_head=5, n_embd=20)
    return hf_state(model), model.config


def initialise(state, config, recipe, k, **options):
    return initialisations.initialise(state, config, Recipe(recipe, **options), k)


def depth(recipe, n):
    """A depth that a recipe can make out of n blocks."""
    return {"stack": 2 * n, "half_width": n}.get(recipe, n - 2)


def block(state, i):
    """The tensors of one block by their names inside it."""
    prefix = f"transformer.h.{i}."
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("recipe", "n_layer", "k", "blocks"),
    [
        ("first", 6, 3, [0, 1, 2]),
        ("last", 6, 3, [3, 4, 5]),
        ("middle", 6, 2, [2, 3]),
        ("middle", 6, 3, [1, 2, 3]),
        ("alternate", 6, 3, [0, 2, 4]),
        ("alternate", 6, 2, [0, 2]),
        ("alternate", 24, 16, [*range(0, 24, 2), 18, 19, 20, 21]),  # DistilBERT-style, paper App. D
        ("first_plus_last", 6, 3, [0, 1, 5]),
        ("first_plus_last", 6, 1, [5]),
        ("ends", 6, 4, [0, 1, 4, 5]),
        ("ends", 6, 3, [0, 1, 5]),
        ("stack", 3, 6, [0, 1, 2, 0, 1, 2]),
        ("hybrid", 36, 18, [*range(9), *range(9)]),  # Large: reference layers 0-8 twice
        ("hybrid", 6, 4, [0, 1, 0, 1]),
        ("half_width", 6, 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_blocks_of_each_recipe(recipe, n_layer, k, blocks):
    assert choose_blocks(recipe, n_layer, k) == blocks


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "random"])
def test_a_recipe_makes_k_blocks_of_the_model_or_refuses(recipe):
    """For every depth of both: so a new recipe is tested by being in the list."""
    made = 0
    for n in range(1, 8):
        for k in range(1, 2 * n + 2):
            try:
                blocks = choose_blocks(recipe, n, k)
            except UserError as e:
                assert f"--layers {k} is more than" in str(e) or f"--layers cannot be {k}" in str(e)
                continue
            assert len(blocks) == k and set(blocks) <= set(range(n))
            made += 1
    assert made >= 7


WHOLE = [recipe for recipe in RECIPES if recipe not in ("half_width", "random")]


@pytest.mark.parametrize("recipe", WHOLE)
def test_whole_blocks_and_embeddings_are_carried(reference, recipe):
    state, config = reference
    new, small, blocks = initialise(state, config, recipe, depth(recipe, 6))
    assert small == dataclasses.replace(config, n_layer=depth(recipe, 6)) and small.n_layer == len(blocks)
    for i, source in enumerate(blocks):
        here, there = block(new, i), block(state, source)
        assert here.keys() == there.keys() and all(here[name] is there[name] for name in here)
    for name in OUTSIDE:
        assert new[name] is state[name]
    assert set(new) == set(gpt2_format.shapes(vars(small)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", WHOLE)
def test_a_block_that_moves_computes_what_it_did(recipe, bias):
    """With the inverse-layer scale, against the same blocks run one after the other where they were."""
    model = tiny_model(
        seed=5, n_layer=6, n_head=5, n_embd=20, bias=bias, scale_attn_by_inverse_layer_idx=True
    )
    state, small, blocks = initialise(hf_state(model), model.config, recipe, depth(recipe, 6))
    moved = GPT(small).eval()
    moved.fill(state, recipe)
    idx = torch.arange(8)[None]
    with torch.no_grad():
        x = model.embed(idx)
        for i in blocks:
            x = model.transformer.h[i](x)
        expected = model.lm_head(model.transformer.ln_f(x))
        assert torch.allclose(moved(idx), expected, atol=1e-5)


def test_block_1_is_not_block_10():
    state = {f"transformer.h.{i}.x": torch.tensor(i) for i in range(12)}
    new = assemble(state, [(state, i) for i in (1, 11)], tiny_config())
    assert new == {
        "transformer.h.0.x": state["transformer.h.1.x"],
        "transformer.h.1.x": state["transformer.h.11.x"],
    }


def test_random_keeps_nothing_and_follows_its_seed(reference):
    state, config = reference
    before = torch.get_rng_state()
    new, small, blocks = initialise(state, config, "random", 3, seed=1)
    assert blocks == [] and small.n_layer == 3
    assert torch.equal(before, torch.get_rng_state())
    assert same(new, initialise(state, config, "random", 3, seed=1)[0])
    other = initialise(state, config, "random", 3, seed=2)[0]
    wte = "transformer.wte.weight"
    assert not torch.equal(new[wte], other[wte]) and not torch.equal(new[wte], state[wte])


def test_half_width_takes_the_first_heads(reference):
    """5 heads of 4: 2 are kept, with 8 channels; every tensor is a corner of the reference's."""
    state, config = reference
    new, small, _ = initialise(state, config, "half_width", 6)
    assert (small.n_layer, small.n_head, small.n_embd) == (6, 2, 8)
    assert {n: tuple(t.shape) for n, t in new.items()} == gpt2_format.shapes(vars(small))
    new = {n: t[:] for n, t in new.items()}
    assert {n: tuple(t.shape) for n, t in new.items()} == gpt2_format.shapes(vars(small))
    c, C = 8, 20
    for i in range(6):
        old, got = block(state, i), block(new, i)
        for q in range(3):
            there = slice(q * C, q * C + c)
            assert torch.equal(
                got["attn.c_attn.weight"][:, q * c : (q + 1) * c], old["attn.c_attn.weight"][:c, there]
            )
            assert torch.equal(got["attn.c_attn.bias"][q * c : (q + 1) * c], old["attn.c_attn.bias"][there])
        assert torch.equal(got["attn.c_proj.weight"], old["attn.c_proj.weight"][:c, :c])
        assert torch.equal(got["mlp.c_fc.weight"], old["mlp.c_fc.weight"][:c, : 4 * c])
        assert torch.equal(got["mlp.c_fc.bias"], old["mlp.c_fc.bias"][: 4 * c])
        assert torch.equal(got["mlp.c_proj.weight"], old["mlp.c_proj.weight"][: 4 * c, :c])
        for name in ("ln_1.weight", "ln_2.bias", "attn.c_proj.bias", "mlp.c_proj.bias"):
            assert torch.equal(got[name], old[name][:c])
    for name in OUTSIDE:
        assert torch.equal(new[name], state[name][..., :c])


def test_half_width_of_xl():
    """25 heads of 64: 12 heads, 768 channels."""
    config = GPTConfig(n_layer=1, n_head=25, n_embd=1600, vocab_size=64, n_vocab=64)
    state = {n: torch.zeros(s) for n, s in gpt2_format.shapes(vars(config)).items()}
    small = initialisations.halve(state, config)[1]
    assert (small.n_head, small.n_embd) == (12, 768)


@pytest.mark.parametrize("layernorms", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_parts(reference, parts, layernorms):
    """What is not taken is random init: ones in LayerNorms, zero biases, small matrices."""
    state, config = reference
    new, small, _ = initialise(state, config, "first", 3, parts=parts, layernorms=layernorms, seed=3)
    other = initialisations.random_state(small, 3)
    taken = {"attn": ["attn."], "mlp": ["mlp."], "attn+mlp": ["attn.", "mlp."], "all": ["attn.", "mlp."]}[
        parts
    ]
    if layernorms:
        taken += {"attn": ["ln_1."], "mlp": ["ln_2."]}.get(parts, ["ln_1.", "ln_2."])
    for i in range(3):
        for name, tensor in block(new, i).items():
            source = block(state, i) if name.startswith(tuple(taken)) else block(other, i)
            assert torch.equal(tensor, source[name]), name
    for name in OUTSIDE:
        assert torch.equal(new[name], state[name])


def test_released_slice_leaves_positions_and_final_norm_random(reference):
    state, config = reference
    new, small, _ = initialise(state, config, "first", 3, released_slice=True, seed=3)
    other = initialisations.random_state(small, 3)
    for i in range(3):
        assert same(block(new, i), block(state, i))
    assert torch.equal(new["transformer.wte.weight"], state["transformer.wte.weight"])
    for name in OUTSIDE[1:]:
        assert torch.equal(new[name], other[name]) and not torch.equal(new[name], state[name])


def test_arguments_are_not_changed(reference):
    state, config = reference
    before = {name: t.clone() for name, t in state.items()}
    for recipe in RECIPES:
        initialise(state, config, recipe, depth(recipe, 6), parts="attn", released_slice=True)
    assert same(state, before)


COMMANDS = [["--recipe", r, "--layers", {"stack": "6", "half_width": "3"}.get(r, "2")] for r in RECIPES]
COMMANDS += [["--layers", "2", "--parts", parts] for parts in PARTS]
COMMANDS += [["--layers", "2", "--layernorms", "False"], ["--layers", "2", "--released_slice"]]


@pytest.mark.parametrize("flags", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("bias", [True, False])
def test_each_command_trains_one_step(tmp_path, flags, bias):
    write_checkpoint(tmp_path / "reference", bias=bias)
    out = tmp_path / "small"
    inherit.main(["--ckpt", str(tmp_path / "reference"), "--out", str(out), *flags])
    origin = checkpoint.read_lineage(out)
    recipe = flags[1] if flags[0] == "--recipe" else "first"
    assert origin["recipe"] == recipe and json.dumps(origin)
    data = write_data(tmp_path / "data")
    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    train.main(arguments(data, tmp_path / "run", init_from=out, max_iters=1, warmup_iters=0, **sizes))
    new = gpt2_format.read_weights(checkpoint.find(str(tmp_path / "run")))
    assert any(not torch.equal(new[name][:], t[:]) for name, t in gpt2_format.read_weights(str(out)).items())
