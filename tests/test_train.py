"""Training: against an independent loop, killed and continued, and from other models."""

import itertools
import math
import os
import shutil
import time

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file

import inherit
import train
from inheritune.base.errors import UserError
from inheritune.base.files import read_json, write_json
from inheritune.data.reader import TrainData
from inheritune.training import logs, planning
from inheritune.training.command_line import parse
from inheritune.training.distributed import Ranks, seed_all
from inheritune.training.logs import read_rows
from inheritune.training.losses import to_device
from inheritune.training.optimizer import make_optimizer, optimizer_tensors
from inheritune.training.planning import split_batch
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint, gpt2_format
from model import GPT, GPTConfig
from tests import tiny
from tests.tiny import arguments, column, contents, cut, refusal, rows, same_weights, write_checkpoint

CPU = torch.device("cpu")


def make_run(data, out, **changes):
    """A Run at its first step, not yet fitted."""
    settings, explicit = parse((TrainSettings,), arguments(data, out, **changes), "test")
    return train.Run(settings, planning.make_plan(settings, explicit, 1), Ranks(), CPU)


# Arithmetic


@pytest.mark.parametrize(
    "batch_tokens, block_size, batch_size, world, expected",
    [
        (491_520, 1024, 12, 1, (480, 12, 40)),
        (491_520, 1024, 16, 8, (480, 15, 4)),
        (491_520, 1024, 10_000, 1, (480, 480, 1)),
        (64, 8, 3, 8, (8, 1, 1)),
        (7 * 8, 8, 6, 1, (7, 1, 7)),
    ],
)
def test_the_batch_is_split_exactly(batch_tokens, block_size, batch_size, world, expected):
    sequences, micro, accumulation = split_batch(batch_tokens, block_size, batch_size, world)
    assert (sequences, micro, accumulation) == expected
    assert world * micro * accumulation * block_size == batch_tokens and micro <= batch_size


@pytest.mark.parametrize(
    "batch_tokens, world, near",
    [(100, 1, "96 or 104"), (100, 3, "96 or 120"), (7, 1, "use 8$"), (1000, 7, "952 or 1,008")],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(batch_tokens, world, near):
    with pytest.raises(UserError, match=near):
        split_batch(batch_tokens, 8, 4, world)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_fall_from_block_to_block(data, tmp_path, optimizer):
    """... down to the embeddings; a factor of 0 trains the last block and norm alone."""
    how = {"n_layer": 3, "optimizer": optimizer}
    run = make_run(data, tmp_path / "a", **how, layer_lr_decay=0.5)
    train.train_step(run)
    rates = {p: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    peak = run.state.row["lr"]
    for name, p in run.model.module.named_parameters():
        below = {"ln_f": 0, "h.2": 0, "h.1": 1, "h.0": 2, "wte": 3, "wpe": 3}
        (power,) = (n for part, n in below.items() if f"transformer.{part}." in name)
        assert rates[p] == peak * 0.5**power

    run = make_run(data, tmp_path / "b", **how, layer_lr_decay=0.0)
    before = {name: p.clone() for name, p in run.model.module.named_parameters()}
    for _ in range(3):
        train.train_step(run)
    for name, p in run.model.module.named_parameters():
        assert torch.equal(p, before[name]) != (".h.2." in name or "ln_f" in name), name


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest():
    """Three steps of each of torch's two optimizers on its own part."""
    settings = TrainSettings(optimizer="muon", learning_rate=0.02, weight_decay=0.3, dtype="bfloat16")
    ours, theirs = GPT(tiny.tiny_config(bias=False)), GPT(tiny.tiny_config(bias=False))
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, settings, CPU)
    matrices = [p for n, p in theirs.named_parameters() if p.dim() == 2 and ".h." in n]
    rest = [p for n, p in theirs.named_parameters() if p.dim() == 1 or ".h." not in n]
    both = (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for step in range(3):
        idx = torch.arange(8)[None] + step
        ours.zero_grad()
        ours(idx, idx).backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = a.grad.clone()
        for o in (optimizer, *both):
            for group in o.param_groups:
                group["lr"] = 0.02 / (step + 1)
            o.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_muon_orthogonalises_in_float32_in_a_float32_run():
    """The first update is the gradient with new singular values, in float64."""
    settings = TrainSettings(optimizer="muon", learning_rate=0.02, weight_decay=0.3, dtype="float32")
    model, idx = GPT(tiny.tiny_config(bias=False)), torch.arange(8)[None]
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, settings, CPU)
    model(idx, idx).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if p.dim() == 2 and ".h." in name:
            u, s, v = torch.linalg.svd(p.grad.double(), full_matrices=False)
            s /= s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            expected = (1 - 0.02 * 0.3) * before[name] - 0.02 * 0.2 * max(p.shape) ** 0.5 * (u * s) @ v
            torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-6, msg=name)


# One run


def test_losses_are_those_of_an_independent_loop(plain, data):
    """transformers' model, torch's AdamW, the data's windows: six steps with clipping and schedule."""
    seed_all(1337)
    c = read_json(f"{plain}/step_00000012/config.json")
    start = GPT(tiny.tiny_config(n_layer=2, bias=False, vocab_size=c["vocab_size"]))
    model = tiny.gpt2(start)
    trained = {n for n, _ in start.named_parameters()}
    # transformers' zero biases stay zero
    named = [(n, p) for n, p in model.named_parameters() if n in trained]
    matrices = [p for n, p in named if p.dim() == 2 and ".h." in n]
    others = [p for n, p in named if not (p.dim() == 2 and ".h." in n)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )
    windows = TrainData(data, 8, 1337)
    decay = [0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(3)]
    for step, (row, lr) in enumerate(zip(rows(plain)[1:7], [0.0025, 0.005, 0.0075, *decay], strict=True)):
        for group in optimizer.param_groups:
            group.update(lr=lr, betas=(0.9, 0.95))
        x, y = to_device(windows.batch(step * 8, 8), CPU)
        loss = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for _, p in named]))
        for _, p in named:
            p.grad *= min(1.0, 1.0 / norm.item())
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["lr"] == pytest.approx(lr, rel=1e-8)
        assert row["tokens"] == 64 * (step + 1)


def test_a_run_makes_exactly_max_iters_updates_and_saves_the_last(plain):
    assert checkpoint.list_steps(plain) == ["step_00000008", "step_00000012"]
    moments = load_file(f"{plain}/latest/optimizer.safetensors")
    assert {v.item() for k, v in moments.items() if k.endswith("/step")} == {12}
    state = read_json(f"{plain}/latest/state.json")
    assert (state["step"], state["tokens"], state["settings"]["learning_rate"]) == (12, 12 * 64, 0.01)
    assert {"git", "hardware", "best_val_loss"} <= state.keys()
    assert [r["step"] for r in rows(plain)] == list(range(13))
    assert [r["step"] for r in rows(plain) if r["val_loss"] is not None] == [0, 4, 8, 12]
    assert column(plain, "loss")[-1] < column(plain, "loss")[0] - 0.5, "and it learns"


def test_the_loss_of_a_checkpoint_is_the_loss_of_its_file(plain, data):
    """The logged val_loss belongs to the weights on disk, and to the first eval_tokens of val."""
    ids = np.fromfile(f"{data}/val.bin", dtype="<u2").astype(np.int64)
    x, y = torch.tensor(ids[:200]).view(25, 8), torch.tensor(ids[1:201]).view(25, 8)
    for step in (8, 12):
        loss = GPT.from_pretrained(f"{plain}/step_{step:08d}")(x, y).item()
        (logged,) = [r["val_loss"] for r in rows(plain) if r["step"] == step]
        assert loss == pytest.approx(logged, abs=1e-6)
    best = read_json(f"{plain}/latest/state.json")["best_val_loss"]
    before_the_last = column(plain, "val_loss")[-2]
    assert best == pytest.approx(before_the_last, abs=1e-8)
    assert os.readlink(f"{plain}/best") == "step_00000012"


def test_accumulation_changes_neither_losses_nor_gradient_norms(plain, data, tmp_path):
    train.main(arguments(data, tmp_path / "a", batch_size=1))
    for name in ("loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(column(tmp_path / "a", name), column(plain, name), rtol=0, atol=1e-5)


def test_validating_more_often_changes_nothing_in_training(plain, data, tmp_path):
    train.main(arguments(data, tmp_path / "a", eval_interval=1, save_interval=4, eval_tokens=80, dropout=0.1))
    train.main(arguments(data, tmp_path / "b", eval_interval=12, save_interval=4, dropout=0.1))
    for name in ("loss", "grad_norm"):
        assert column(tmp_path / "a", name) == column(tmp_path / "b", name)
    assert column(tmp_path / "a", "loss") != column(plain, "loss"), "dropout does something"
    for name in ("model", "optimizer"):
        a, b = (open(tmp_path / x / f"latest/{name}.safetensors", "rb").read() for x in "ab")
        assert a == b


def test_a_run_draws_its_losses(plain, tmp_path):
    shutil.copy(f"{plain}/log.csv", tmp_path)
    tiny.DRAW_LOSSES(str(tmp_path))
    assert plt.imread(tmp_path / "loss.png").std() > 0


def test_times_are_those_that_passed(data, tmp_path):
    began = time.perf_counter()
    train.main(arguments(data, tmp_path / "a"))
    wall = time.perf_counter() - began
    timing = read_rows(tmp_path / "a/timing.csv")
    timing = [{k: float(v) if v else None for k, v in row.items()} for row in timing]
    assert [r["step"] for r in timing] == list(range(13)) and timing[0]["tokens_per_s"] is None
    assert 0 < timing[-1]["val_s"] < wall and timing[-1]["train_s"] + timing[-1]["val_s"] < wall
    assert timing[-1]["memory_mb"] > 50
    for before, after in itertools.pairwise(timing):
        if after["step"] > 1:  # the first step of a process is left out
            assert after["tokens_per_s"] == pytest.approx(64 / (after["train_s"] - before["train_s"]))
        assert (before["val_s"] < after["val_s"]) == (after["step"] % 4 == 0)


def test_speed_is_that_since_the_last_line_and_time_left_counts_validations(data, tmp_path, capsys):
    """A first step that compiles shows in no speed, and a slow stretch in one line only."""
    recorder = make_run(data, tmp_path / "a").recorder
    for step, seconds in enumerate((100.0, 2.0, 2.0, 8.0), start=1):
        recorder.stepped(step, seconds)
        recorder.last_val_s = 6.0
        recorder.report(step, {}, {})
    assert [r["tokens_per_s"] for r in read_rows(tmp_path / "a/timing.csv")] == ["", "32", "32", "8"]
    # eight steps of 8 s, and two validations of 6 s
    assert "256 tokens | 8 tok/s | mfu n/a | eta 0:01:16" in capsys.readouterr().out


def test_checkpoints_come_every_save_interval_and_where_the_best_validation_is(data, tmp_path, monkeypatch):
    """... which takes the place of the best one before. Not a number is never the best."""
    losses = iter([9.0, 5.0, 4.0, 4.5, math.nan, 3.0, math.inf])
    monkeypatch.setattr(train, "validate", lambda run: {"val_loss": next(losses)})
    train.main(arguments(data, tmp_path / "a", eval_interval=2, save_interval=7, keep_last=2))
    steps = ["step_00000007", "step_00000010", "step_00000012"]
    assert checkpoint.list_steps(tmp_path / "a")[-2:] == steps[1:]
    assert os.readlink(tmp_path / "a/best") == "step_00000010"
    assert read_json(tmp_path / "a/latest/state.json")["best_val_loss"] == 3.0


def test_stop_at_val_loss_stops_saves_and_is_the_best(plain, data, tmp_path):
    target = column(plain, "val_loss")[2]  # at step 8
    train.main(arguments(data, tmp_path / "a", stop_at_val_loss=target + 1e-6, save_interval=5))
    assert rows(tmp_path / "a")[-1]["step"] == 8
    assert os.readlink(tmp_path / "a/latest") == os.readlink(tmp_path / "a/best") == "step_00000008"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_keeps_fp32_masters(plain, data, tmp_path, dtype):
    train.main(arguments(data, tmp_path / "a", dtype=dtype))
    np.testing.assert_allclose(column(tmp_path / "a", "loss"), column(plain, "loss"), atol=0.05)
    assert column(tmp_path / "a", "loss") != column(plain, "loss"), "it is not simply float32"
    weights = gpt2_format.read_model(checkpoint.find(str(tmp_path / "a")))[0]
    assert {weights[n].dtype for n in weights} == {torch.float32}


def test_seeds_decide_start_and_order(plain, data, tmp_path):
    train.main(arguments(data, tmp_path / "a", max_iters=2, lr_decay_iters=12))
    train.main(arguments(data, tmp_path / "b", max_iters=2, lr_decay_iters=12, seed=2))
    assert rows(tmp_path / "a")[2] == rows(plain)[2] | {"val_loss": rows(tmp_path / "a")[2]["val_loss"]}
    assert rows(tmp_path / "b")[1]["loss"] != rows(plain)[1]["loss"]


def test_a_dry_run_needs_nothing_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--dry_run"])
    train.main(["--dry_run", "--init_from=gpt2-large", "--inherit_layers=18", "--block_size=512"])
    out = capsys.readouterr().out
    assert "data/openwebtext: not prepared" in out
    assert "18 blocks x 20 heads x 1280, context 512" in out
    assert os.listdir(tmp_path) == []


def test_a_run_goes_on_with_the_tokens_that_it_began_with(tmp_path):
    """... if its folder says what it holds, and the checkpoint what it was trained on."""
    data, out = tiny.write_data(tmp_path / "data"), tmp_path / "a"
    train.main(arguments(data, out, max_iters=4, lr_decay_iters=12))
    shutil.move(data, tmp_path / "moved")
    train.main(arguments(tmp_path / "moved", out, max_iters=4, lr_decay_iters=12, resume="must"))
    tiny.write_data(tmp_path / "data", high=50)  # of the same name and size
    again = arguments(data, out, resume="must")
    said = refusal(train.main, again)
    assert f"data holds other tokens than {out} was trained on" in said
    state = out / "step_00000004/state.json"
    write_json(state, read_json(state) | {"data": None})  # as of an earlier version
    train.main(again)


def test_a_dry_run_without_data_takes_the_teachers_tokenizer(tmp_path, capsys):
    write_checkpoint(tmp_path / "bytes", tokenizer="bytes")
    argv = arguments(tmp_path / "nowhere", tmp_path / "out", teacher=tmp_path / "bytes", dry_run=True)
    train.main(argv)
    assert "320 ids" in capsys.readouterr().out  # of bytes, padded


# Non-finite steps


class Poison(torch.nn.Module):
    """A model whose loss, or only its gradient, is not finite at the calls in `when`."""

    def __init__(self, model, when, what):
        super().__init__()
        self.model, self.when, self.what, self.calls = model, when, what, 0

    def forward(self, idx, targets):
        loss = self.model(idx, targets)
        if self.training:
            self.calls += 1
            if self.calls in self.when:
                if self.what == "loss":
                    return loss * math.nan
                loss.register_hook(lambda g: g * math.inf)
        return loss


@pytest.mark.parametrize("what, dtype", [("loss", "float32"), ("gradient", "float16")])
def test_a_non_finite_step_changes_nothing_and_the_next_goes_on(data, tmp_path, what, dtype, capsys):
    run = make_run(data, tmp_path / "a", batch_size=4, dtype=dtype)  # two micro-batches a step
    run.model.forward = Poison(run.model.module, {4}, what)  # the second of step 2
    train.train_step(run)
    before = {k: v.clone() for k, v in run.model.module.state_dict().items()}
    moments = {k: v.clone() for k, v in optimizer_tensors(run.model.module, run.optimizer).items()}
    train.train_step(run)
    assert same_weights(before, run.model.module.state_dict())
    assert same_weights(moments, optimizer_tensors(run.model.module, run.optimizer))
    assert (run.state.step, run.state.bad_steps, run.state.bad_in_a_row) == (2, 1, 1)
    assert "step 2: loss" in capsys.readouterr().out
    train.train_step(run)
    assert (run.state.bad_steps, run.state.bad_in_a_row) == (1, 0)
    assert not same_weights(before, run.model.module.state_dict())
    assert math.isfinite(run.state.row["loss"]) and math.isfinite(run.state.row["grad_norm"])


# Continued


def test_rows_after_the_checkpoint_are_dropped_and_a_cut_line_too(plain, data, tmp_path):
    """... and the run continued once more, when it is done, changes nothing."""
    out = cut(plain, tmp_path / "a", 8)
    with open(out / "log.csv", "a") as f:
        f.write("13,832,1.0,,0.1,0.2\n14,8")
    for _ in range(2):
        train.main(arguments(data, out, resume="auto"))
        assert contents(out) == contents(plain)


def test_a_wsd_run_can_be_made_longer_until_its_decay_begins(data, tmp_path):
    """Of 8 steps whose last 4 decay, 4 are those of 12 steps whose last 2 decay."""
    wsd = {"schedule": "wsd", "keep_last": 9}
    train.main(arguments(data, tmp_path / "whole", **wsd, cooldown_iters=2))
    train.main(arguments(data, tmp_path / "a", **wsd, max_iters=8, cooldown_iters=4))
    longer = arguments(data, tmp_path / "a", **wsd, cooldown_iters=2, resume="must")
    said = refusal(train.main, longer)
    assert "(max_iters was 8, is 12; cooldown_iters was 4, is 2): add --change to" in said
    shutil.rmtree(tmp_path / "a/step_00000008")
    train.main(longer)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_a_log_can_gain_columns(plain, data, tmp_path, monkeypatch):
    """The rows of old steps leave them empty. A column that is gone is no reason to lose its numbers."""
    out = cut(plain, tmp_path / "a", 8)
    monkeypatch.setattr(logs, "LOG_COLUMNS", ("weight_norm", *logs.LOG_COLUMNS))
    train.main(arguments(data, out, resume="must"))
    assert rows(out) == [{"weight_norm": None} | row for row in rows(plain)]
    monkeypatch.undo()
    said = refusal(train.main, arguments(data, out, resume="must"))
    assert "log.csv has columns ['weight_norm', 'step'," in said


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"optimizer": "muon"}, {"teacher": True}])
def test_every_kind_of_run_learns_and_continues_bit_for_bit(data, tmp_path, changes):
    """With its loss scale, momentum or teacher."""
    if "teacher" in changes:
        write_checkpoint(tmp_path / "teacher")
        changes = {"teacher": tmp_path / "teacher", "kd_alpha": 0.9}
    train.main(arguments(data, tmp_path / "a", **changes, keep_last=9))
    losses = column(tmp_path / "a", "loss")
    assert losses[-1] < losses[0] - 0.3
    out = cut(tmp_path / "a", tmp_path / "b", 8)
    train.main(arguments(data, out, **changes, keep_last=9, resume="must"))
    assert contents(out) == contents(tmp_path / "a")


def test_a_run_from_before_a_setting_existed_had_its_default(plain, data, tmp_path):
    out = cut(plain, tmp_path / "a", 8)
    state = read_json(out / "step_00000008/state.json")
    del state["settings"]["optimizer"]
    write_json(out / "step_00000008/state.json", state)
    message = refusal(train.main, arguments(data, out, resume="must", optimizer="muon"))
    assert "optimizer was 'adamw', is 'muon'" in message
    train.main(arguments(data, out, resume="must"))
    assert contents(out) == contents(plain)


def test_harmless_settings_may_change(plain, data, tmp_path):
    out = cut(plain, tmp_path / "moved", 8)
    changes = {"eval_interval": 3, "save_interval": 6, "log_interval": 2, "keep_last": 5, "batch_size": 2}
    train.main(arguments(data, out, resume="auto", checkpoint_activations="full", **changes))
    np.testing.assert_allclose(column(out, "loss")[-1], column(plain, "loss")[-1], atol=1e-5)


def test_a_run_that_had_not_saved_yet_starts_afresh(plain, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "save_checkpoint", lambda run: (_ for _ in ()).throw(UserError("cut")))
    refusal(train.main, arguments(data, tmp_path / "a"))
    monkeypatch.undo()
    assert "already holds a run" in refusal(train.main, arguments(data, tmp_path / "a"))
    train.main(arguments(data, tmp_path / "a", resume="auto"))
    assert contents(tmp_path / "a") == contents(plain)


# Starting from another model


def without_shape(data, out, **changes):
    return arguments(data, out, **dict.fromkeys(tiny.SHAPE) | changes)


def test_init_from_with_inherit_layers_is_inherit_then_init_from(data, tmp_path):
    write_checkpoint(tmp_path / "ref", bias=False)
    content, ids = read_json(tmp_path / "ref/config.json"), {"eos_token_id": [256, 3], "pad_token_id": 5}
    write_json(tmp_path / "ref/config.json", content | ids)
    train.main(without_shape(data, tmp_path / "a", init_from=tmp_path / "ref", inherit_layers=2))
    inherit.main(["--ckpt", str(tmp_path / "ref"), "--layers", "2", "--out", str(tmp_path / "sub")])
    train.main(without_shape(data, tmp_path / "b", init_from=tmp_path / "sub"))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / f"a/latest/{name}").read_bytes() == (tmp_path / f"b/latest/{name}").read_bytes()
    assert ids.items() <= read_json(tmp_path / "a/latest/config.json").items()
    made = GPTConfig.from_folder(str(tmp_path / "a/latest"))
    assert (made.n_layer, made.bias, made.vocab_size) == (2, False, 320)
    lineage = read_json(tmp_path / "a/latest/lineage.json")
    assert [b["block"] for b in lineage["blocks"]] == [0, 1]
    assert lineage["sources"]["reference"]["name"].endswith("/ref")


def test_a_smaller_block_size_keeps_the_first_positions(data, tmp_path):
    model = write_checkpoint(tmp_path / "ref")
    shape = dict.fromkeys(tiny.SHAPE) | {"block_size": 4}
    run = make_run(data, tmp_path / "a", init_from=tmp_path / "ref", **shape)
    assert run.model.module.config.block_size == 4
    assert torch.equal(run.model.module.transformer.wpe.weight, model.transformer.wpe.weight[:4])
    idx = torch.randint(257, (2, 4))
    torch.testing.assert_close(run.model.module.eval()(idx), model(idx))
