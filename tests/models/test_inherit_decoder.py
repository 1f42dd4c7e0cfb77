"""inherit.py on models that are no GPT-2. pytest tests/models"""

import copy
import json
import os
import re

import pytest
import torch
import transformers

import inherit
import train
from inheritune.models.initialisations import RECIPES, choose_blocks
from inheritune.models.open_model import open_config
from inheritune.weights import checkpoint
from tests.other_models import build
from tests.tiny import arguments, gpt2, refusal, tiny_model, write_data

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
    "kind", ["llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gemma", "gemma2", "mixtral"]
)
@pytest.mark.parametrize(
    "flags, blocks",
    [
        ("--layers 2", [0, 1]),
        ("--layers 2 --recipe last", [2, 3]),
        ("--layers 3 --recipe alternate", [0, 2, 2]),
        ("--layers 3 --recipe first_plus_last", [0, 1, 3]),
        ("--blocks 1,3,0", [1, 3, 0]),
    ],
)
def test_logits_are_those_with_the_other_layers_deleted(kind, flags, blocks, tmp_path):
    if blocks == [0, 2, 2]:
        blocks = choose_blocks("alternate", 4, 3)
    model = build(kind)
    model.save_pretrained(tmp_path / kind)
    inherit.main([*flags.split(), "--ckpt", str(tmp_path / kind), "--out", str(tmp_path / "out")])
    expected = logits(without(model, blocks))
    assert (logits(opened(tmp_path / "out")) - expected).abs().max() < 1e-5
    assert (expected - logits(model)).abs().max() > 1e-2  # the test would see a model that is not cut
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == len(blocks)
    if kind == "qwen2":
        local = [b >= 2 for b in blocks]  # max_window_layers can say so if these are the last ones
        assert config.get("max_window_layers") == (local.count(False) if local == sorted(local) else None)
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert lineage["blocks"] == [{"from": "reference", "block": b} for b in blocks]


def test_a_gpt2_that_model_py_does_not_implement(tmp_path):
    model = gpt2(tiny_model(bias=True, block_size=32))
    model.config.activation_function = "gelu"
    model.save_pretrained(tmp_path / "gelu")
    model = opened(tmp_path / "gelu")
    inherit.main(["--blocks", "2,0", "--ckpt", str(tmp_path / "gelu"), "--out", str(tmp_path / "out")])
    assert (logits(opened(tmp_path / "out")) - logits(without(model, [2, 0]))).abs().max() < 1e-5


def test_shards_and_other_files(tmp_path):
    """Many files of weights become one; tokenizer, template and what else lies there are copied."""
    source = tmp_path / "llama"
    build("llama").to(torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
    assert len([n for n in os.listdir(source) if n.endswith(".safetensors")]) > 3
    others = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}", "LICENSE": b"free"}
    for name, content in others.items():
        (source / name).write_bytes(content)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    inherit.main(["--layers", "3", "--ckpt", str(source), "--out", str(tmp_path / "out")])
    names = {"config.json", "generation_config.json", "lineage.json", "model.safetensors", *others}
    assert set(os.listdir(tmp_path / "out")) - {"README.md"} == names
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in others.items())
    assert opened(tmp_path / "out").dtype == torch.bfloat16


def test_extra_blocks_are_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    folders = ["--ckpt", tmp_path / "llama", "--out", tmp_path / "out"]
    message = refusal(inherit.main, [*folders, "--layers", "2"])
    assert re.search(r"model.layers.3.\S+ is not a llama tensor.*\(and 6 more\)", message)


def test_refusals(tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")
    ckpt = ["--ckpt", tmp_path / "llama", "--out", tmp_path / "out"]
    for flags in (["--parts", "attn"], ["--released_slice"], ["--layernorms", "false"]):
        message = refusal(inherit.main, [*ckpt, "--layers", "2", *flags])
        assert f"only whole blocks can be taken of this model: leave out {flags[0]}" in message
    assert "leave out --recipe half_width" in refusal(inherit.main, [*ckpt, "--recipe", "half_width"])
    assert "is more than the 4 blocks" in refusal(inherit.main, [*ckpt, "--layers", "5"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in ("half_width", "random")])
def test_every_recipe_for_whole_blocks_opens(kind, recipe, tmp_path):
    model, layers = build(kind), "8" if recipe == "stack" else "2"
    model.save_pretrained(tmp_path / kind)
    flags = ["--recipe", recipe, "--layers", layers, "--out", str(tmp_path / "out")]
    inherit.main(["--ckpt", str(tmp_path / kind), *flags])
    blocks = choose_blocks(recipe, 4, int(layers))
    assert (logits(opened(tmp_path / "out")) - logits(without(model, blocks))).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_random_init_has_the_architecture_and_none_of_the_weights(kind, tmp_path):
    """It needs no weights of the source: a config.json will do."""
    build(kind).config.save_pretrained(tmp_path / kind)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ["--recipe", "random", "--layers", "2", f"--seed={seed}", "--out", str(tmp_path / name)]
        inherit.main(["--ckpt", str(tmp_path / kind), *flags])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert opened(tmp_path / "a").config.num_hidden_layers == 2
    std = opened(tmp_path / "a").get_input_embeddings().weight.std().item()
    assert std == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_growing_onto(kind, tmp_path):
    """The first two blocks, changed, then the reference's third; gemma2's layers are of two kinds in turn."""
    reference, small = build(kind), build(kind, seed=1, num_hidden_layers=2)
    for name, model in (("reference", reference), ("small", small)):
        model.save_pretrained(tmp_path / name)
    onto = ["--ckpt", tmp_path / "reference", "--layers", "3", "--out", tmp_path / "grown", "--onto"]
    inherit.main([*map(str, onto), str(tmp_path / "small")])
    grown = opened(tmp_path / "grown")
    config = open_config(str(tmp_path / "reference")).with_blocks([0, 1, 2])
    assert open_config(str(tmp_path / "grown")) == config
    small.model.layers.append(reference.model.layers[2])
    small.config = grown.config
    small.model.config = grown.config
    assert (logits(grown) - logits(small)).abs().max() < 1e-5
    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    flags = arguments(write_data(tmp_path / "data"), tmp_path / "run", init_from=tmp_path / "grown", **sizes)
    train.main([*flags, "--max_iters=1", "--warmup_iters=0"])
    trained = opened(checkpoint.find(str(tmp_path / "run"))).state_dict()
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in grown.state_dict().items())

    build(kind, num_hidden_layers=2, rope_theta=99.0).save_pretrained(tmp_path / "other")
    assert "cannot grow: rope_" in refusal(inherit.main, [*onto, tmp_path / "other"])
