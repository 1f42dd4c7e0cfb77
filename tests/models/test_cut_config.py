"""Blocks of any model: the same modules in a new order, or a refusal that says why."""

import math

import pytest
import torch

from inheritune.base.errors import UserError
from inheritune.base.files import write_json
from inheritune.models.open_model import open_config
from inheritune.weights.checkpoint import new_lineage
from tests.other_models import build, cut, without
from tests.tiny import change_json

IDX = torch.randint(3, 257, (1, 20), generator=torch.Generator().manual_seed(5))


def save(kind, folder, **changes):
    model = build(kind, **changes)
    model.save_pretrained(folder)
    return model


def assert_cut(model, folder, blocks):
    """The logits are those of the model whose other blocks do nothing. Returns the new config.json."""
    ours = cut(str(folder), blocks)
    with torch.no_grad():
        assert torch.allclose(ours(IDX), without(model, blocks, IDX), rtol=1e-4, atol=1e-4)
    return ours.config.content()


@pytest.mark.parametrize(
    "kind, options, edit, blocks, expected",
    [
        # Gemma 2 on the hub has no layer_types: every second layer is local by its place, which cuts change
        ("gemma2", {}, {"layer_types": None}, [1, 3], {"layer_types": ["full_attention"] * 2}),
        ("deepseek_v3", {"first_k_dense_replace": 2}, {"mlp_layer_types": None}, [1, 2], {}),
        ("gpt_neo", {}, {}, [1, 3], {"attention_types": [[["local", "local"], 1]]}),
        # a list that happens to be as long as the model is deep
        ("mamba2", {"depth": 2}, {}, [1], {"num_hidden_layers": 1, "time_step_limit": [0.0, math.inf]}),
        # numbers that decide no list stay
        ("deepseek_v32", {"depth": 6}, {}, [3, 4, 5], {"max_position_embeddings": 64}),
        ("mamba", {}, {"n_layer": 4}, [0, 2], {"n_layer": 2, "num_hidden_layers": 2}),
    ],
)
def test_config_json_follows_the_blocks(kind, options, edit, blocks, expected, tmp_path):
    model = save(kind, tmp_path, **options)
    change_json(tmp_path / "config.json", **edit)
    assert expected.items() <= assert_cut(model, tmp_path, blocks).items()


@pytest.mark.parametrize(
    "kind, key, changes",
    [
        ("gemma3_text", "sliding_window_pattern", {"sliding_window_pattern": 2}),
        ("smollm3", "no_rope_layer_interval", {"no_rope_layer_interval": 2}),
    ],
)
def test_config_json_says_one_thing(kind, key, changes, tmp_path):
    """A number from which other readers compute the lists goes when it gives other ones."""
    model = save(kind, tmp_path, **changes)
    change_json(tmp_path / "config.json", **changes)
    assert key in assert_cut(model, tmp_path, [0, 1])  # as before: every second block
    assert key not in assert_cut(model, tmp_path, [1, 2, 3])
    warning = open_config(str(tmp_path)).with_blocks([1, 2, 3]).warning
    assert "readers must use" in warning
    # a run that starts from such a cut says it too
    write_json(tmp_path / "lineage.json", {"warning": warning})
    assert new_lineage(str(tmp_path), [0])["warning"] == warning
    assert not open_config(str(tmp_path)).with_blocks([0, 1]).warning


@pytest.mark.parametrize(
    "kind, blocks, answer",
    [
        ("diffllama", [1, 2], "lambda_init of block 1 is"),
        ("minimax", [0, 1], "of block 1 is .* that of the new block 1"),
        ("llama", [4], "asked for block 4, but the model has blocks 0 to 3"),
        ("llama", [], "asked for at least one block"),
    ],
)
def test_what_cannot_be_cut_is_refused(kind, blocks, answer, tmp_path):
    save(kind, tmp_path)
    with pytest.raises(UserError, match=answer):
        open_config(str(tmp_path)).with_blocks(blocks)


@pytest.mark.parametrize(
    "kind, answer", [("bert", "this bert is no causal model"), ("xlm", "no single stack of 4 blocks")]
)
def test_what_is_no_causal_stack_is_refused(kind, answer, tmp_path):
    save(kind, tmp_path)
    with pytest.raises(UserError, match=answer):
        cut(str(tmp_path), [0])
