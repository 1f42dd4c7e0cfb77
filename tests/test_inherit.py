"""Inheriting and growing: the right blocks, bit for bit, from an untouched source."""

import dataclasses
import json
import os

import pytest
from safetensors.torch import load_file, save_file

import inherit
from inheritune.base.files import read_json
from inheritune.models.initialisations import Recipe
from inheritune.weights import checkpoint, gpt2_format, tensors
from model import GPT, GPTConfig
from tests.tiny import hf_state, same_weights, tiny_model, write_checkpoint, write_data, write_model

OUTSIDE = {f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}


def block(state, number):
    prefix = f"transformer.h.{number}."
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


@pytest.fixture
def reference(tmp_path):
    """(folder, model) of four random blocks."""
    return str(tmp_path / "ref"), write_checkpoint(tmp_path / "ref", n_layer=4)


@pytest.mark.parametrize(
    "flags, blocks",
    [
        (["--layers", "1"], [0]),
        (["--layers=3"], [0, 1, 2]),
        (["--blocks", "0,3"], [0, 3]),
        (["--blocks=1-2"], [1, 2]),
        (["--blocks=0-1,3, 2"], [0, 1, 3, 2]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_chosen_blocks_arrive_renumbered_bit_for_bit(tmp_path, flags, blocks, bias):
    write_checkpoint(tmp_path / "ref", n_layer=4, bias=bias)
    inherit.main(["--ckpt", str(tmp_path / "ref"), *flags, "--out", str(tmp_path / "sub")])
    source, made = (load_file(tmp_path / x / "model.safetensors") for x in ("ref", "sub"))
    for i, number in enumerate(blocks):
        assert same_weights(block(source, number), block(made, i))
    assert same_weights({k: source[k] for k in OUTSIDE}, {k: v for k, v in made.items() if ".h." not in k})
    config = GPTConfig.from_folder(str(tmp_path / "sub"))
    assert config == dataclasses.replace(GPTConfig.from_folder(str(tmp_path / "ref")), n_layer=len(blocks))
    lineage = checkpoint.read_lineage(str(tmp_path / "sub"))
    assert lineage["blocks"] == [{"from": "reference", "block": b} for b in blocks]


def test_the_dtype_on_disk_is_kept(reference, tmp_path):
    path = f"{reference[0]}/model.safetensors"
    half = {k: v.bfloat16() for k, v in load_file(path).items()}
    os.unlink(path)
    save_file(half, path, metadata={"format": "pt"})
    inherit.main(["--ckpt", reference[0], "--layers=2", "--out", str(tmp_path / "sub")])
    made = load_file(tmp_path / "sub/model.safetensors")
    assert same_weights(made, {k: v for k, v in half.items() if k in made})
    assert read_json(tmp_path / "sub/config.json")["torch_dtype"] == "bfloat16"


def test_only_the_tensors_that_are_kept_are_read(reference, tmp_path, monkeypatch):
    read, check = [], tensors.check_finite
    monkeypatch.setattr(tensors, "check_finite", lambda t, name, *a: read.append(name) or check(t, name, *a))
    inherit.main(["--ckpt", reference[0], "--blocks", "3", "--out", str(tmp_path / "sub")])
    names = gpt2_format.shapes(vars(reference[1].config))
    assert sorted(read) == sorted(n for n in names if ".h." not in n or ".h.3." in n), "each once"


def test_the_source_is_only_read(reference, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "ref").iterdir()}
    inherit.main(["--ckpt", reference[0], "--layers=2", "--out", str(tmp_path / "sub")])
    assert {path: path.read_bytes() for path in (tmp_path / "ref").iterdir()} == before


def test_growing_onto_a_trained_model(reference, tmp_path):
    """Its blocks and everything outside them, then the reference's next ones."""
    small = write_checkpoint(tmp_path / "small", seed=7, n_layer=2)
    flags = ["--layers=3", "--onto", str(tmp_path / "small"), "--out", str(tmp_path / "grown")]
    inherit.main(["--ckpt", reference[0], *flags])
    made, theirs = load_file(tmp_path / "grown/model.safetensors"), hf_state(small)
    for i in (0, 1):
        assert same_weights(block(made, i), block(theirs, i))
    assert same_weights(block(made, 2), block(hf_state(reference[1]), 2))
    assert same_weights({k: made[k] for k in OUTSIDE}, {k: theirs[k] for k in OUTSIDE})
    origin = checkpoint.read_lineage(str(tmp_path / "grown"))
    assert [(b["from"], b["block"]) for b in origin["blocks"]] == [("onto", 0), ("onto", 1), ("reference", 2)]
    assert origin["embeddings_and_ln_f"] == "onto" and set(origin["sources"]) == {"onto", "reference"}


def test_lineage_says_where_from_and_through_what(reference, tmp_path):
    os.rename(reference[0], tmp_path / "step_00000042")
    (tmp_path / "step_00000042/state.json").write_text('{"step": 42}')
    first, second = tmp_path / "first", tmp_path / "second"
    inherit.main(["--ckpt", str(tmp_path / "step_00000042"), "--layers=3", "--out", str(first)])
    inherit.main(["--ckpt", str(first), "--blocks=0,2", "--out", str(second)])
    origin = json.loads((second / "lineage.json").read_text())
    source = origin["sources"]["reference"]
    assert source["name"] == f"{tmp_path.name}/first"
    assert str(tmp_path) not in json.dumps(origin), "no private paths"
    (weights,) = source["files"].values()
    assert weights["bytes"] == (first / "model.safetensors").stat().st_size
    assert [b["block"] for b in source["lineage"]["blocks"]] == [0, 1, 2]
    assert source["lineage"]["sources"]["reference"]["step"] == 42


def test_lineage_tells_models_apart(tmp_path):
    for seed in (0, 1):
        write_checkpoint(tmp_path / str(seed), seed=seed)
    (tmp_path / "0/other.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    a, b = (checkpoint.fingerprint(str(tmp_path / s))["files"]["model.safetensors"] for s in "01")
    assert a["bytes"] == b["bytes"] and a["sample_sha256"] != b["sample_sha256"]


def test_layers_auto_takes_the_blocks_that_change_most(tmp_path, capsys):
    model = tiny_model(n_layer=4, block_size=100)
    for i in (0, 2):  # these hardly change what passes through them
        for linear in (model.transformer.h[i].attn.c_proj, model.transformer.h[i].mlp.c_proj):
            linear.weight.data *= 1e-3
            linear.bias.data.zero_()
    (tmp_path / "ref").mkdir()
    write_model(tmp_path / "ref", model)
    data, out = write_data(tmp_path / "data", val=600), str(tmp_path / "small")
    inherit.main(["--ckpt", str(tmp_path / "ref"), "--layers", "auto", "--data", data, "--out", out])
    lineage = checkpoint.read_lineage(out)
    assert [b["block"] for b in lineage["blocks"]] == [1, 3]
    assert f"blocks 1, 3: {lineage['layers_auto']}" in capsys.readouterr().out


def test_lineage_says_how_to_make_it_again(tmp_path, capsys):
    write_checkpoint(tmp_path / "ref")
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        made = ["--layers=2", "--recipe=random", f"--seed={seed}", "--out", str(tmp_path / name)]
        inherit.main(["--ckpt", str(tmp_path / "ref"), *made])
    assert f"{tmp_path}/a: 2 random blocks, 11,840 values" in capsys.readouterr().out
    a, b, c = (GPT.from_pretrained(str(tmp_path / name)) for name in "abc")
    assert same_weights(a, b) and not same_weights(a, c)
    lineage = read_json(tmp_path / "c/lineage.json")
    assert vars(Recipe("random", seed=8)).items() <= lineage.items()


def test_every_field_of_a_recipe_is_a_flag():
    def recipe(*flags):
        return inherit.recipe_of(inherit.make_parser().parse_args(["--ckpt=a", "--out=b", *flags]))

    assert recipe() == Recipe()
    other = Recipe("ends", parts="attn", layernorms=False, released_slice=True, seed=3)
    flags = [f"--{key}={value}" for key, value in vars(other).items() if key != "released_slice"]
    assert recipe(*flags, "--released_slice") == other
