"""inherit.py on models that are no GPT-2. pytest tests/weights/test_any_layout.py"""

import copy
import json
import os

import pytest
import torch
import transformers

import inherit
import train
from inheritune.base.errors import UserError
from inheritune.weights.any_layout import cut_model
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
        blocks = inherit.choose_blocks("alternate", 4, 3)
    model = build(kind)
    model.save_pretrained(tmp_path / kind)
    inherit.main([*flags.split(), "--ckpt", str(tmp_path / kind), "--out", str(tmp_path / "out")])
    expected = logits(without(model, blocks))
    assert (logits(opened(tmp_path / "out")) - expected).abs().max() < 1e-5
    assert (expected - logits(model)).abs().max() > 1e-2  # the test would see a model that is not cut
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == len(blocks)
    if kind == "qwen2":
        assert config["max_window_layers"] == sum(b < 2 for b in blocks)
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


def test_lists_that_an_old_config_leaves_out_are_written(tmp_path):
    """Gemma 2 on the hub has no layer_types: every second layer is local by its place, which cuts change."""
    model = build("gemma2")
    model.save_pretrained(tmp_path / "gemma2")
    path = tmp_path / "gemma2/config.json"
    config = json.loads(path.read_text())
    types = config.pop("layer_types")
    path.write_text(json.dumps(config))
    inherit.main(["--blocks", "1,3", "--ckpt", str(tmp_path / "gemma2"), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_types"] == [types[1], types[3]]
    assert (logits(opened(tmp_path / "out")) - logits(without(model, [1, 3]))).abs().max() < 1e-5


@pytest.mark.parametrize(
    "kind, blocks, answer",
    [
        ("gpt_neo", [0, 1], "attention_types"),
        ("jamba", [1, 2], "attn_layer_period"),
        ("llama", [4], "asked for block 4, but the model has blocks 0 to 3"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(kind, blocks, answer, tmp_path):
    build(kind).save_pretrained(tmp_path / kind)
    with pytest.raises(UserError, match=answer):
        cut_model(str(tmp_path / kind), str(tmp_path / "out"), lambda n: blocks)
    assert not (tmp_path / "out").exists()


def test_extra_blocks_are_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"expected the tensors of blocks 0 to 2, found model.layers.0…3"):
        cut_model(str(tmp_path / "llama"), str(tmp_path / "out"), lambda n: [0])


def test_refusals(tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")
    ckpt = ["--ckpt", tmp_path / "llama", "--out", tmp_path / "out"]
    for flags in (
        ["--parts", "attn"],
        ["--released_slice"],
        ["--layernorms", "false"],
        ["--recipe", "random"],
    ):
        message = refusal(inherit.main, [*ckpt, "--layers", "2", *flags])
        assert f"only whole blocks can be taken of it: leave out {flags[0]}" in message
    assert "is more than the 4 blocks" in refusal(inherit.main, [*ckpt, "--layers", "5"])
    data = write_data(tmp_path / "data", val=600)
    message = refusal(train.main, arguments(data, tmp_path / "run", init_from=tmp_path / "llama"))
    assert "model_type is 'llama'" in message and "transformers' Trainer, litgpt and torchtitan" in message
    assert not (tmp_path / "out").exists()


def test_layers_auto(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "llama")
    data = write_data(tmp_path / "data", val=600)
    flags = [
        "--layers",
        "auto",
        "--data",
        data,
        "--ckpt",
        str(tmp_path / "llama"),
        "--out",
        str(tmp_path / "out"),
    ]
    inherit.main(flags)
    reason = json.loads((tmp_path / "out/lineage.json").read_text())["layers_auto"]
    assert reason in capsys.readouterr().out
