"""The analysis of models that are no GPT-2, against numpy on transformers' own attentions.
pytest tests/experiments/test_any_model.py"""

import copy
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import analyze
from inheritune.experiments.any_model import AnyModel
from inheritune.experiments.attention_metrics import attention_maps, draw_windows, look, skip_losses
from model import GPT
from tests.experiments.test_attention_metrics import mass, no_column_0, rank, row_entropy
from tests.other_models import build
from tests.tiny import ROOT, gpt2, refusal, tiny_model, write_data

IDX = torch.randint(0, 257, (5, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("any_model") / "data", val=600)


def opened(model, folder):
    model.save_pretrained(folder)
    return AnyModel.from_pretrained(str(folder))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "mistral"])
def test_agrees_with_numpy_on_transformers_attention(kind, tmp_path):
    theirs = build(kind)
    ours = opened(theirs, tmp_path / kind)
    heads, influence, norms = look(ours, IDX, (0.9, 0.8))
    with torch.no_grad():
        out = theirs(IDX, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 4 and out.attentions[0].shape == (5, 4, 20, 20)  # 4 heads, of 2 groups
    if kind == "mistral":
        assert not out.attentions[0][:, :, 10, :2].any()  # the window slides
    measured = {
        "rank_0.9": rank,
        "rank_0.8": lambda A: rank(A, 0.8),
        "rank_without_first": lambda A: rank(no_column_0(A)),
        "mass": mass,
        "entropy": row_entropy,
        "sink": lambda A: A[:, 0].mean(),
    }
    assert heads.keys() == measured.keys()
    for name, f in measured.items():
        for layer, A in enumerate(out.attentions):  # (B, nh, T, T)
            expected = [np.mean([f(a) for a in A[:, h].numpy()]) for h in range(4)]
            assert heads[name][layer].tolist() == pytest.approx(expected, abs=1e-4)
    hidden = out.hidden_states[:-1]  # the last one has passed the final norm
    assert norms[:-1].tolist() == pytest.approx([x.norm(dim=-1).mean().item() for x in hidden], rel=1e-4)
    turned = [1 - F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(hidden)]
    assert influence[:-1].tolist() == pytest.approx(turned, abs=1e-4)
    maps = attention_maps(ours, IDX[2], [(1, 3)])
    assert np.allclose(maps[1, 3], out.attentions[1][2, 3].numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mistral"])
def test_skip_losses_are_those_of_models_without_the_block(kind, tmp_path):
    theirs = build(kind)
    ours = opened(theirs, tmp_path / kind)
    targets = IDX.roll(-1, 1)
    loss, losses = skip_losses(ours, IDX, targets)

    def loss_of(model):
        with torch.no_grad():
            return F.cross_entropy(model(IDX, use_cache=False).logits.flatten(0, 1), targets.flatten()).item()

    assert loss == pytest.approx(loss_of(theirs), rel=1e-5)
    for i in range(4):
        shorter = copy.deepcopy(theirs)
        del (shorter.gpt_neox if kind == "gpt_neox" else shorter.model).layers[i]
        shorter.config.num_hidden_layers = 3
        assert losses[i] == pytest.approx(loss_of(shorter), rel=1e-5)
    assert len({round(x, 4) for x in [loss, *losses]}) == 5
    assert skip_losses(ours, IDX, targets) == (loss, losses)  # nothing is left replaced


def test_gpt2_gives_the_same_either_way(tmp_path):
    model = tiny_model(block_size=32, n_embd=32, n_head=4, bias=True)
    gpt2(model).save_pretrained(tmp_path / "gpt2")
    ours, any_model = (
        GPT.from_pretrained(str(tmp_path / "gpt2")),
        AnyModel.from_pretrained(str(tmp_path / "gpt2")),
    )
    a, b = look(ours, IDX), look(any_model, IDX)
    assert a[0].keys() == b[0].keys()
    for name in a[0]:
        assert torch.allclose(a[0][name], b[0][name], atol=1e-5)
    assert torch.allclose(a[1], b[1], atol=1e-5) and torch.allclose(a[2], b[2], rtol=1e-5)
    (loss, losses), (loss_b, losses_b) = (skip_losses(m, IDX, IDX.roll(-1, 1)) for m in (ours, any_model))
    assert [loss, *losses] == pytest.approx([loss_b, *losses_b], rel=1e-5)


def test_command_line(data, tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "llama")
    flags = f"--ckpt {tmp_path}/llama --data {data} --out {tmp_path}/out"
    analyze.main([*flags.split(), "--sequences=6", "--length=30", "--device=cpu"])
    found = json.loads((tmp_path / "out/analysis.json").read_text())
    idx, targets = draw_windows(data, "val", 6, 30, 1337)
    model = AnyModel.from_pretrained(str(tmp_path / "llama"))
    assert found["heads"]["rank_0.9"] == look(model, idx)[0]["rank_0.9"].tolist()
    assert (found["loss"], found["layers"]["loss_without"]) == skip_losses(model, idx, targets)
    assert {"analysis.json", "rank.png", "maps.png"} == set(os.listdir(tmp_path / "out"))
    assert "MaxRank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, answer",
    [
        ("mamba", "none of its layers give attention matrices (they are linear_attention); mamba cannot"),
        (
            "jamba",
            "only 2 of its 4 layers give attention matrices (they are full_attention, linear_attention)",
        ),
    ],
)
def test_layers_without_attention_are_refused_by_name(kind, answer, data, tmp_path):
    build(kind).save_pretrained(tmp_path / kind)
    message = refusal(analyze.main, ["--ckpt", tmp_path / kind, "--data", data, "--out", tmp_path / "out"])
    assert answer in message and kind in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_refusals(data, tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")

    def says(*flags, data=data):
        command = ["--ckpt", tmp_path / "llama", "--data", data, "--out", tmp_path / "out", *flags]
        return refusal(analyze.main, command)

    assert "--length 99 is more than the 64 tokens" in says("--length", "99")
    assert "'4.0' is no head; write LAYER.HEAD, from 0.0 to 3.3" in says("--heads", "4.0")
    other = write_data(tmp_path / "data", tokenizer={"name": "gpt2", "n_vocab": 50257, "eot": 50256})
    assert "data has 50257 ids" in says(data=other)

    config = tmp_path / "llama/config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"num_hidden_layers": 5}))
    assert "lacks the weights of model.layers.4." in says()
    config.write_text(json.dumps(content | {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / "llama/evil.py").write_text("raise SystemExit('ran')")
    assert "transformers cannot open" in says() and "\n" not in says()
    (tmp_path / "llama/model.safetensors").unlink()
    config.write_text(json.dumps(content))
    assert "transformers cannot open" in says()


def test_gpt2_needs_no_transformers(data, tmp_path):
    from tests.tiny import write_checkpoint

    write_checkpoint(tmp_path / "ckpt", block_size=16)
    code = (
        f"import sys, analyze; analyze.main('--ckpt {tmp_path}/ckpt --data {data} --sequences 3 --device cpu "
        f"--out {tmp_path}/out'.split()); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
