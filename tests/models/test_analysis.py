"""The analysis of models of transformers, against numpy on their own attentions."""

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
from inheritune.experiments.attention_metrics import attention_maps, measure_layers, skip_losses
from inheritune.models.open_model import load_model
from tests.experiments.test_attention_metrics import assert_agrees
from tests.other_models import build, without
from tests.tiny import ROOT, write_checkpoint, write_data

IDX = torch.randint(0, 257, (5, 20), generator=torch.Generator().manual_seed(1))
TARGETS = IDX.roll(-1, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("analysis") / "data", val=600)


def saved(model, folder):
    model.save_pretrained(folder)
    return load_model(str(folder))


@pytest.mark.parametrize("kind", ["gpt_neox", "mistral", "gemma2"])
def test_agrees_with_numpy_on_transformers_attention(kind, tmp_path):
    theirs = build(kind)
    ours = saved(theirs, tmp_path)
    with torch.no_grad():
        out = theirs(IDX, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 4 and out.attentions[0].shape == (5, 4, 20, 20)  # 4 heads, of 2 groups
    if kind == "mistral":
        assert not out.attentions[0][:, :, 10, :2].any()  # the window slides
    assert_agrees(measure_layers(ours, IDX, (0.9, 0.8)), out)
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
