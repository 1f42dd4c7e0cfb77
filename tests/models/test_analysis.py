"""The analysis of models of transformers, against numpy on their own attentions. pytest tests/models"""

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
import inherit
from inheritune.base.errors import UserError
from inheritune.experiments.attention_metrics import (
    attention_maps,
    measure_layers,
    skip_losses,
)
from inheritune.models.open_model import load_model
from tests.experiments.test_attention_metrics import mass, no_column_0, rank, row_entropy
from tests.other_models import build, without
from tests.tiny import ROOT, refusal, write_checkpoint, write_data

IDX = torch.randint(0, 257, (5, 20), generator=torch.Generator().manual_seed(1))
TARGETS = IDX.roll(-1, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("analysis") / "data", val=600)


def saved(model, folder):
    """Our model of the folder into which a model of transformers is saved."""
    model.save_pretrained(folder)
    return load_model(str(folder))


@pytest.mark.parametrize("kind", ["gpt_neox", "mistral", "gemma2"])
def test_agrees_with_numpy_on_transformers_attention(kind, tmp_path):
    theirs = build(kind)
    ours = saved(theirs, tmp_path)
    heads, influence, norms = measure_layers(ours, IDX, (0.9, 0.8))
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
    assert heads.keys() - {"rest"} == measured.keys()
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


@pytest.mark.parametrize("kind", ["llama", "gemma2", "jamba"])
def test_skip_losses_are_those_of_models_without_the_block(kind, tmp_path):
    theirs = build(kind)
    ours = saved(theirs, tmp_path)
    loss, losses = skip_losses(ours, IDX, TARGETS)

    assert loss == pytest.approx(ours(IDX, TARGETS).item(), rel=1e-5)
    for i in range(4):
        logits = without(theirs, [j for j in range(4) if j != i], IDX)
        expected = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten()).item()
        assert losses[i] == pytest.approx(expected, rel=1e-5)
    assert len({round(x, 4) for x in [loss, *losses]}) == 5
    assert skip_losses(ours, IDX, TARGETS) == (loss, losses)  # nothing is left replaced


def test_models_without_attention_matrices(data, tmp_path, capsys):
    """They get block influence, norms and losses; --layers auto chooses by these."""
    build("mamba").save_pretrained(tmp_path / "mamba")
    ckpt = ["--ckpt", str(tmp_path / "mamba"), "--data", data, "--out"]
    analyze.main([*ckpt, str(tmp_path / "analysis"), "--sequences=6", "--length=30", "--device=cpu"])
    found = json.loads((tmp_path / "analysis/analysis.json").read_text())
    assert os.listdir(tmp_path / "analysis") == ["analysis.json"] and found["heads"] is None
    assert found["layers"].keys() == {"block_influence", "residual_norm", "loss_without"}
    assert "this model has no attention matrices to measure" in capsys.readouterr().out
    assert measure_layers(load_model(str(tmp_path / "mamba")), IDX)[0] is None
    inherit.main([*ckpt, str(tmp_path / "out"), "--layers", "auto"])
    reason = json.loads((tmp_path / "out/lineage.json").read_text())["layers_auto"]
    assert reason in capsys.readouterr().out


def test_learned_sinks_count_as_sink(tmp_path):
    """What gpt-oss gives to its learned sinks is missing from the rows of its matrices."""
    theirs = build("gpt_oss")
    heads, _, _ = measure_layers(saved(theirs, tmp_path), IDX)
    with torch.no_grad():
        A = torch.stack(theirs(IDX, output_attentions=True).attentions, 1)  # (B, n_layer, nh, T, T)
    expected = (A[..., 0] + 1 - A.sum(-1)).mean((0, -1)).double()
    assert heads["rest"].min() > 0.01 and torch.allclose(heads["sink"], expected, atol=1e-5)


def test_blocks_that_do_not_pass_hidden_states_on_are_refused(tmp_path):
    ours = saved(build("llama"), tmp_path)
    ours.blocks[1].register_forward_pre_hook(lambda block, args: (args[0] + 1, *args[1:]))
    with pytest.raises(UserError, match="the blocks of a llama do not pass hidden states on to one another"):
        next(ours.attention_steps(IDX))


def test_refusals(data, tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")

    def says(*flags, data=data):
        command = ["--ckpt", tmp_path / "llama", "--data", data, "--out", tmp_path / "out", *flags]
        return refusal(analyze.main, command)

    assert "--length 99 is more than the 64 tokens" in says("--length", "99")
    other = write_data(tmp_path / "data", tokenizer={"name": "gpt2", "n_vocab": 50257, "eot": 50256})
    assert "data has 50257 ids" in says(data=other)

    config = tmp_path / "llama/config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"num_hidden_layers": 5}))
    assert "model.layers.4.self_attn.q_proj.weight is missing" in says()
    config.write_text(json.dumps(content | {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / "llama/evil.py").write_text("raise SystemExit('ran')")
    assert "has no model_type 'mine'; code in a folder is never run" in says() and "\n" not in says()
    (tmp_path / "llama/model.safetensors").unlink()
    config.write_text(json.dumps(content))
    assert "has no model.safetensors" in says()


def test_gpt2_needs_no_transformers(data, tmp_path):
    """Importing it takes seconds. Nor does planning a run need the other slow packages."""
    write_checkpoint(tmp_path / "ckpt", block_size=16)
    code = f"""import sys, train
from inheritune.models.open_model import load_model
train.main(["--dry_run", "--init_from={tmp_path}/ckpt", "--dataset={data}", "--inherit_layers=2"])
slow = {{"transformers", "huggingface_hub", "datasets", "pyarrow", "torch._dynamo"}}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
load_model("{tmp_path}/ckpt")
assert "transformers" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
