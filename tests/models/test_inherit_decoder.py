"""inherit.py on models that are no GPT-2."""

import copy
import json

import pytest
import torch
import transformers

import inherit
from inheritune.models.open_model import open_config
from tests.other_models import build
from tests.tiny import change_json, refusal

IDX = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDX, use_cache=False).logits


def without(model, blocks):
    """The same model with the other layers deleted."""
    shorter = copy.deepcopy(model)
    body = getattr(shorter, shorter.base_model_prefix)
    name = "h" if hasattr(body, "h") else "layers"
    setattr(body, name, torch.nn.ModuleList(getattr(body, name)[i] for i in blocks))
    shorter.config.num_hidden_layers = len(blocks)
    if getattr(shorter.config, "layer_types", None):
        shorter.config.layer_types = [shorter.config.layer_types[i] for i in blocks]
    return shorter


def opened(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model


@pytest.mark.parametrize(
    "kind, flags, blocks",
    [
        ("llama", "--layers 2", [0, 1]),
        ("qwen2", "--layers 2 --recipe last", [2, 3]),
        ("qwen2", "--blocks 1,3,0", [1, 3, 0]),
        ("qwen3", "--layers 3 --recipe alternate", [0, 2, 1]),
        ("mistral", "--layers 3 --recipe first_plus_last", [0, 1, 3]),
        ("gpt_neox", "--blocks 1,3,0", [1, 3, 0]),
        ("gemma2", "--layers 8 --recipe stack", [0, 1, 2, 3] * 2),
        ("mixtral", "--blocks 1,3,0", [1, 3, 0]),
        ("gpt2", "--blocks 2,0", [2, 0]),  # with an activation that model.py does not implement
    ],
)
def test_logits_are_those_with_the_other_layers_deleted(kind, flags, blocks, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path / kind)
    inherit.main([*flags.split(), "--ckpt", str(tmp_path / kind), "--out", str(tmp_path / "out")])
    expected = logits(without(model, blocks))
    assert (logits(opened(tmp_path / "out")) - expected).abs().max() < 1e-5
    assert (expected - logits(model)).abs().max() > 1e-2  # the test would see a model that is not cut
    if kind == "qwen2":
        local = [b >= 2 for b in blocks]  # max_window_layers can say so if these are the last ones
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config.get("max_window_layers") == (local.count(False) if local == sorted(local) else None)
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert lineage["blocks"] == [{"from": "reference", "block": b} for b in blocks]


def test_shards_become_one_file_of_the_same_dtype_and_no_code_is_named(tmp_path):
    source = tmp_path / "llama"
    model = build("llama").to(torch.bfloat16)
    model.model.norm.float()  # as routers keep some tensors
    model.config.auto_map = {"AutoConfig": "configuration.Mine"}  # code that is not copied
    model.save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    inherit.main(["--layers", "3", "--ckpt", str(source), "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert opened(tmp_path / "out").dtype == torch.bfloat16
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_random_init_has_the_architecture_and_none_of_the_weights(tmp_path):
    """It needs no weights of the source: a config.json will do."""
    build("gemma2").config.save_pretrained(tmp_path / "gemma2")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ["--recipe", "random", "--layers", "2", f"--seed={seed}", "--out", str(tmp_path / name)]
        inherit.main(["--ckpt", str(tmp_path / "gemma2"), *flags])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert opened(tmp_path / "a").config.num_hidden_layers == 2
    std = opened(tmp_path / "a").get_input_embeddings().weight.std().item()
    assert std == pytest.approx(0.02, rel=0.05)


def test_growing_onto(tmp_path):
    """The first two blocks, changed, then the reference's third; gemma2's layers are of two kinds in turn."""
    reference, small = build("gemma2"), build("gemma2", seed=1, num_hidden_layers=2)
    for name, model in (("reference", reference), ("small", small)):
        model.save_pretrained(tmp_path / name)
    onto = ["--ckpt", tmp_path / "reference", "--layers", "3", "--out", tmp_path / "grown", "--onto"]
    # a config.json may leave out a default, which transformers writes
    change_json(tmp_path / "reference/config.json", attention_dropout=None)
    inherit.main([*map(str, onto), str(tmp_path / "small")])
    grown = opened(tmp_path / "grown")
    config = open_config(str(tmp_path / "reference")).with_blocks([0, 1, 2])
    assert open_config(str(tmp_path / "grown")) == config
    small.model.layers.append(reference.model.layers[2])
    small.config = small.model.config = grown.config
    assert (logits(grown) - logits(small)).abs().max() < 1e-5

    build("gemma2", num_hidden_layers=2, rope_theta=99.0).save_pretrained(tmp_path / "other")
    assert "cannot grow: rope_" in refusal(inherit.main, [*onto, tmp_path / "other"])
