"""train.py on models of transformers that are no GPT-2, against transformers' own model and torch's AdamW."""

import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

import train
from inheritune.data.reader import TrainData
from inheritune.models.open_model import load_model
from inheritune.training.losses import to_device
from tests.other_models import KINDS, build
from tests.tiny import alike, arguments, column, contents, cut

GIVEN = dict.fromkeys(("n_layer", "n_head", "n_embd"))  # not on the command line: the model decides
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """{kind: folder of a tiny model with four blocks}, made when it is asked for."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = str(tmp_path_factory.mktemp(kind) / "source")
            build(kind).save_pretrained(made[kind])
        return made[kind]

    return make


def first_blocks(model, kept):
    """Delete all but the first blocks of transformers' model; returns their parameters."""
    (blocks,) = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    del blocks[kept:]
    return set(blocks.parameters())


def independent_losses(source, data, steps, kept):
    """The losses of transformers' model with its first `kept` blocks: AdamW, decay, clipping, warm-up."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    inside = first_blocks(model, kept)
    matrices = [p for p in model.parameters() if p in inside and p.dim() > 1]  # 3: of a mixture's experts
    others = [p for p in model.parameters() if not (p in inside and p.dim() > 1)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    windows, losses = TrainData(data, 8, 1337), []
    for step in range(steps):
        x, y = to_device(windows.batch(step * 8, 8), CPU)
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / 7
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_an_independent_loop(folder, data, tmp_path, kind):
    """... and the checkpoint is one that transformers opens, with the same logits."""
    source, out = folder(kind), tmp_path / "out"
    options = {**GIVEN, "init_from": source, "inherit_layers": 2, "max_iters": 5, "warmup_iters": 6}
    train.main(arguments(data, out, **options))
    np.testing.assert_allclose(column(out, "loss"), independent_losses(source, data, 5, 2), rtol=1e-5)
    opened = transformers.AutoModelForCausalLM.from_pretrained(out / "latest")
    idx = torch.arange(16).view(2, 8)
    with torch.no_grad():
        logits = opened(idx).logits
        ours = load_model(str(out / "latest"))(idx)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert opened.config.num_hidden_layers == 2


@pytest.mark.parametrize("kind, matrices, experts", [("llama", 7, 0), ("mixtral", 5, 2)])  # of each block
def test_the_whole_model_is_trained_and_muon_takes_matrices(folder, data, tmp_path, kind, matrices, experts):
    options = {**GIVEN, "init_from": folder(kind), "optimizer": "muon", "checkpoint_activations": "full"}
    train.main(arguments(data, tmp_path / "out", **options, layer_lr_decay=0.9))
    losses = column(tmp_path / "out", "loss")
    assert losses[-1] < losses[0] - 0.3
    state = load_file(tmp_path / "out/latest/optimizer.safetensors")
    momentum = [name for name in state if "momentum" in name]
    assert len(momentum) == 4 * matrices and all("model.layers." in name for name in momentum)
    stacked = [name for name, tensor in state.items() if tensor.dim() == 3]
    assert len(stacked) == 4 * experts * 2 and all("/exp_avg" in name for name in stacked)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_distillation_from_the_uncut_model(folder, data, tmp_path, kind):
    """The first KL is that of transformers' two models; training lowers it."""
    source, out = folder(kind), tmp_path / "out"
    options = {**GIVEN, "init_from": source, "inherit_layers": 3, "teacher": source, "kd_alpha": 0.0}
    train.main(arguments(data, out, **options, learning_rate=1e-3, warmup_iters=0, min_lr=1e-4, max_iters=24))
    x, _ = to_device(TrainData(data, 8, 1337).batch(0, 8), CPU)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        wanted = F.log_softmax(teacher(x).logits, dim=-1).flatten(0, 1)
        first_blocks(teacher, 3)
        found = F.log_softmax(teacher(x).logits, dim=-1).flatten(0, 1)
    kl, first = column(out, "kl"), F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    assert kl[0] == pytest.approx(first.item(), rel=1e-4)
    assert sum(kl[-3:]) < sum(kl[:3]) and column(out, "loss") == kl


def test_a_run_continues_bit_for_bit(folder, data, tmp_path):
    options = {**GIVEN, "init_from": folder("llama"), "inherit_layers": 2, "keep_last": 9}
    train.main(arguments(data, tmp_path / "whole", **options))
    train.main(arguments(data, cut(tmp_path / "whole", tmp_path / "out", 4), **options, resume="must"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_are_one_run(forks, folder, data, tmp_path, shard):
    options = {**GIVEN, "init_from": folder("llama"), "inherit_layers": 2, "batch_size": 2}
    train.main(arguments(data, tmp_path / "one", **options))
    argv = arguments(data, tmp_path / "two", **options, shard=shard)
    assert forks.train(argv, world=2)[0] == 0, forks.printed
    alike(tmp_path / "two", tmp_path / "one")


def test_a_dry_run_reads_no_weights_and_the_context_is_the_runs_choice(folder, data, tmp_path, capsys):
    source = shutil.copytree(folder("llama"), tmp_path / "weightless")
    os.unlink(source / "model.safetensors")
    options = {**GIVEN, "init_from": source, "dry_run": True, "batch_tokens": 64}
    train.main(arguments(data, tmp_path / "out", **options | {"block_size": None}))
    assert "4 blocks x 4 heads x 32, context 64, 257 ids" in capsys.readouterr().out
    train.main(arguments(data, tmp_path / "out", **options, inherit_layers=2))
    assert "2 blocks x 4 heads x 32, context 8, 257 ids" in capsys.readouterr().out
