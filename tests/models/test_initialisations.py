"""Each initialisation: exactly which tensors equal which."""

import dataclasses

import pytest
import torch

from inheritune.base.errors import UserError
from inheritune.models import initialisations
from inheritune.models.initialisations import PARTS, RECIPES, Recipe, choose_blocks
from inheritune.weights import gpt2_format
from model import GPT
from tests.tiny import hf_state, same_weights, tiny_model

OUTSIDE = [f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")]


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
    prefix = f"transformer.h.{i}."
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}


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


@pytest.mark.parametrize("recipe", WHOLE)
def test_a_block_that_moves_computes_what_it_did(recipe):
    """With the inverse-layer scale, against the same blocks run one after the other where they were."""
    model = tiny_model(seed=5, n_layer=6, n_head=5, n_embd=20, scale_attn_by_inverse_layer_idx=True)
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


def test_random_keeps_nothing_and_follows_its_seed(reference):
    state, config = reference
    before = torch.get_rng_state()
    new, small, blocks = initialise(state, config, "random", 3, seed=1)
    assert blocks == [] and small.n_layer == 3
    assert torch.equal(before, torch.get_rng_state())
    assert same_weights(new, initialise(state, config, "random", 3, seed=1)[0])
    other = initialise(state, config, "random", 3, seed=2)[0]
    wte = "transformer.wte.weight"
    assert not torch.equal(new[wte], other[wte]) and not torch.equal(new[wte], state[wte])


def test_half_width_takes_the_first_heads(reference):
    """5 heads of 4: 2 are kept, with 8 channels; every tensor is a corner of the reference's."""
    state, config = reference
    new, small, _ = initialise(state, config, "half_width", 6)
    assert (small.n_layer, small.n_head, small.n_embd) == (6, 2, 8)
    assert {n: tuple(t.shape) for n, t in new.items()} == gpt2_format.shapes(vars(small))
    c, C = 8, 20
    for i in range(6):
        old, got = block(state, i), block(new, i)
        for q in range(3):
            here, there = slice(q * c, q * c + c), slice(q * C, q * C + c)
            assert torch.equal(got["attn.c_attn.weight"][:, here], old["attn.c_attn.weight"][:c, there])
            assert torch.equal(got["attn.c_attn.bias"][here], old["attn.c_attn.bias"][there])
        assert torch.equal(got["attn.c_proj.weight"], old["attn.c_proj.weight"][:c, :c])
        assert torch.equal(got["mlp.c_fc.weight"], old["mlp.c_fc.weight"][:c, : 4 * c])
        assert torch.equal(got["mlp.c_fc.bias"], old["mlp.c_fc.bias"][: 4 * c])
        assert torch.equal(got["mlp.c_proj.weight"], old["mlp.c_proj.weight"][: 4 * c, :c])
        for name in ("ln_1.weight", "ln_2.bias", "attn.c_proj.bias", "mlp.c_proj.bias"):
            assert torch.equal(got[name], old[name][:c])
    for name in OUTSIDE:
        assert torch.equal(new[name], state[name][..., :c])


@pytest.mark.parametrize("layernorms", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_parts(reference, parts, layernorms):
    """What is not taken is random init: ones in LayerNorms, zero biases, small matrices."""
    state, config = reference
    new, small, _ = initialise(state, config, "first", 3, parts=parts, layernorms=layernorms, seed=3)
    other = initialisations.random_weights(small, 3)
    pairs = {"attn": ["attn.", "ln_1."], "mlp": ["mlp.", "ln_2."]}
    taken = pairs.get(parts, [*pairs["attn"], *pairs["mlp"]])
    taken = taken if layernorms else [name for name in taken if "ln_" not in name]
    for i in range(3):
        for name, tensor in block(new, i).items():
            source = block(state, i) if name.startswith(tuple(taken)) else block(other, i)
            assert torch.equal(tensor, source[name]), name
    for name in OUTSIDE:
        assert torch.equal(new[name], state[name])


def test_released_slice_leaves_positions_and_final_norm_random(reference):
    state, config = reference
    new, small, _ = initialise(state, config, "first", 3, released_slice=True, seed=3)
    other = initialisations.random_weights(small, 3)
    taken = initialise(state, config, "first", 3)[0]
    assert same_weights(new, taken | {name: other[name] for name in OUTSIDE[1:]})
