"""Blocks of any model: the same modules in a new order, or a refusal that says why."""

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


def test_lists_that_an_old_config_leaves_out_are_written(tmp_path):
    """Gemma 2 on the hub has no layer_types: every second layer is local by its place, which cuts change."""
    model = save("gemma2", tmp_path)
    types = model.config.layer_types
    change_json(tmp_path / "config.json", layer_types=None)
    assert assert_cut(model, tmp_path, [1, 3])["layer_types"] == [types[1], types[3]]


def test_numbers_follow(tmp_path):
    model = save("deepseek_v3", tmp_path, first_k_dense_replace=2)
    change_json(tmp_path / "config.json", mlp_layer_types=None)
    assert_cut(model, tmp_path, [1, 2])


def test_nested_lists_are_cut(tmp_path):
    content = assert_cut(save("gpt_neo", tmp_path), tmp_path, [1, 3])
    assert content["attention_types"] == [[["local", "local"], 1]]


def test_a_list_that_is_as_long_as_the_model_is_deep_stays(tmp_path):
    content = assert_cut(save("mamba2", tmp_path, depth=2), tmp_path, [1])
    assert len(content["time_step_limit"]) == 2 and content["num_hidden_layers"] == 1


def test_the_depth_under_two_names(tmp_path):
    model = save("mamba", tmp_path)
    change_json(tmp_path / "config.json", n_layer=4)
    content = assert_cut(model, tmp_path, [0, 2])
    assert content["n_layer"] == content["num_hidden_layers"] == 2


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
