"""A model in shards (--shard) trains like one that is whole: against DDP and one process, and continued as
any of them.

pytest tests/training/test_shard.py        (-m slow for 4 ranks, half precision, signals, compile)
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

import train
from inheritune.weights import checkpoint
from tests.tiny import ROOT, arguments, column, contents, write_checkpoint
from tests.training.test_distributed import two_ranks

# gradients are clipped, accumulated, and of a width that 4 ranks cannot share evenly
LIKE = {"grad_clip": 0.5, "batch_size": 1, "n_embd": 18, "keep_last": 9}


def together(world, *runs):
    """Several runs of train.py, one after the other in the processes of one torchrun. A run is its arguments
    or (arguments, what `disturb` does to rank world - 1)."""
    runs = [run if isinstance(run, tuple) else (run, {}) for run in runs]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world}",
        __file__,
    ]
    text = json.dumps([([str(a) for a in argv], what) for argv, what in runs])
    done = subprocess.run(
        [*command, text],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def alike(a, b, half=False):
    """The logs, weights and moments of two run folders agree; in 16 bits, where shards round the residual
    stream too, less."""
    atol, of_weights = (5e-3, 2e-2) if half else (1e-5, 1e-5)
    for name in ("loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(column(a, name), column(b, name), rtol=0, atol=atol)
    for name in ("model", "optimizer"):
        one, two = (load_file(os.path.join(x, "latest", f"{name}.safetensors")) for x in (a, b))
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(one[key], two[key], rtol=0, atol=of_weights, err_msg=key)


def cut(run, out, step):
    """A copy of a run folder as it was when the checkpoint of `step` was the newest."""
    shutil.copytree(run, out, symlinks=True)
    for name in checkpoint.list_steps(out):
        if int(name[5:]) > step:
            shutil.rmtree(os.path.join(out, name))
    return out


@pytest.fixture(scope="session")
def one(data, tmp_path_factory):
    """The run folder of twelve steps in one process (where shard=True changes nothing)."""
    out = str(tmp_path_factory.mktemp("one") / "out")
    train.main(arguments(data, out, **LIKE, shard=True))
    return out


def test_two_ranks_with_shards_are_one_run(one, data, tmp_path):
    """Against one process; against DDP with dropout; and continued from the one as the other, back and
    forth."""
    cut(one, tmp_path / "continued", 4)
    drop = {"dropout": 0.1, "max_iters": 6, "lr_decay_iters": 12}
    together(
        2,
        arguments(data, tmp_path / "shards", **LIKE, shard=True),
        arguments(
            data,
            tmp_path / "continued",
            **LIKE | {"max_iters": 8, "lr_decay_iters": 12},
            shard=True,
            resume="must",
        ),
        arguments(data, tmp_path / "ddp", **LIKE | drop),
        arguments(data, tmp_path / "dropped", **LIKE | drop, shard=True),
    )
    alike(tmp_path / "shards", one)
    alike(tmp_path / "dropped", tmp_path / "ddp")
    assert column(tmp_path / "ddp", "loss")[0] != column(one, "loss")[0], "dropout does something"
    whole = {"lr_decay_iters": 12, "resume": "must"}
    train.main(arguments(data, tmp_path / "continued", **LIKE | whole))
    alike(tmp_path / "continued", one)


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_from_any_other(one, data, tmp_path):
    """2 → 4 → 1 ranks in shards; and in shards → DDP → in shards."""
    for world, name, steps, shard in (
        (2, "a", 4, True),
        (4, "a", 8, True),
        (1, "a", 12, True),
        (2, "b", 4, True),
        (4, "b", 8, False),
        (2, "b", 12, True),
    ):
        part = LIKE | {"max_iters": steps, "lr_decay_iters": 12, "resume": "auto", "shard": shard}
        together(world, arguments(data, tmp_path / name, **part))
    alike(tmp_path / "a", one)
    alike(tmp_path / "b", one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        *({"dtype": "bfloat16"}, {"dtype": "float16"}, {"teacher": True}, {"compile": True}),
        *({"checkpoint_activations": "cheap"}, {"checkpoint_activations": "full", "compile": True}),
        {"checkpoint_activations": "cheap", "compile": True},
    ],
)
def test_shards_do_what_ddp_does(data, tmp_path, change):
    if "teacher" in change:
        write_checkpoint(tmp_path / "teacher", seed=5, bias=False)
        change = {"teacher": tmp_path / "teacher"}
    together(2, *(arguments(data, tmp_path / f"{s}", **LIKE | change, shard=s) for s in (True, False)))
    alike(tmp_path / "True", tmp_path / "False", half="dtype" in change)


@pytest.mark.slow
def test_weights_travel_in_16_bits_and_gradients_in_32(data, tmp_path):
    code = """
    import torch.distributed as dist
    sent = {}
    def noting(kind, call):
        def noted(output, input, *rest, **how):
            sent.setdefault(kind, set()).add(input.dtype)
            return call(output, input, *rest, **how)
        return noted
    for name in ("all_gather_{}", "reduce_scatter_{}"):
        new, old = name.format("single"), name.format("tensor").replace("gather", "gather_into")
        name = new if hasattr(dist, new) else old  # before torch 2.13
        setattr(dist, name, noting(name.split("_")[0], getattr(dist, name)))
    def checked(run):
        sent.clear()
        step(run)
        assert sent == {"all": {torch.bfloat16}, "reduce": {torch.float32}}, sent
        assert {p.dtype for p in run.model.module.parameters()} == {torch.float32}
    train.train_step = checked
    """
    argv = arguments(data, tmp_path / "a", **LIKE, dtype="bfloat16", shard=True)
    done = two_ranks(tmp_path, argv, code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_so_on_all(data, tmp_path, dtype):
    """... and the loss scale falls on all."""
    runs = (arguments(data, tmp_path / f"{s}", **LIKE, dtype=dtype, shard=s) for s in (True, False))
    together(2, *((argv, {"poison": 5}) for argv in runs))
    alike(tmp_path / "True", tmp_path / "False", half=dtype == "float16")
    states = [checkpoint.read_state(str(tmp_path / s / "latest")) for s in ("True", "False")]
    assert (
        states[0]["bad_steps"] == states[1]["bad_steps"] == 1 and states[0]["scaler"] == states[1]["scaler"]
    )


@pytest.mark.slow
def test_shards_asked_to_end_or_at_their_goal_save_and_go_on(data, tmp_path):
    """At a step; in a validation, of which ranks have unequal shares; and what is saved after a validation is
    whole."""
    more = LIKE | {"eval_tokens": 390, "batch_size": 2, "save_interval": 6, "shard": True}
    asked = {name: arguments(data, tmp_path / name, **more, resume="auto") for name in ("step", "validation")}
    said = together(
        2,
        arguments(data, tmp_path / "whole", **more),
        (asked["step"], {"end_in_step": 5}),
        asked["step"],
        (asked["validation"], {"end_in_validation": 2}),
        asked["validation"],
    )
    assert said.count("SIGTERM: saved ") == 2
    for name in ("step", "validation"):
        made = contents(tmp_path / "whole")
        assert {key: contents(tmp_path / name).get(key) for key in made} == made
    goal = column(tmp_path / "whole", "val_loss")[2] + 1e-6
    together(
        2,
        *(
            arguments(data, tmp_path / f"{s}", **more | {"stop_at_val_loss": goal, "shard": s})
            for s in (True, False)
        ),
    )
    assert checkpoint.list_steps(tmp_path / "True") == ["step_00000006", "step_00000008"]
    alike(tmp_path / "True", tmp_path / "False")


def main():
    """The other side of `together`, on each rank."""
    step, mean_loss = train.train_step, train.mean_loss
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    for attempt, (argv, what) in enumerate(json.loads(sys.argv[1])):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(
            attempt
        )  # as if torchrun had started these processes anew
        train.train_step, train.mean_loss = step, mean_loss
        if last:
            disturb(**what)
        try:
            train.main(argv)
        except SystemExit as end:
            if not what or end.code != 128 + signal.SIGTERM:
                raise


def disturb(end_in_step=None, end_in_validation=None, poison=None):
    """Have this process get SIGTERM at the beginning of that step (updates made before) or validation (from 1
    on), or a gradient that is not finite in the step `poison`."""
    train_step, mean_loss, seen = train.train_step, train.mean_loss, []

    def stepping(run):
        if run.state.step == end_in_step:
            os.kill(os.getpid(), signal.SIGTERM)
        if run.state.step == poison:
            hook = run.model.module.register_forward_hook(
                lambda m, i, loss: loss.register_hook(lambda g: g * math.inf) and None
            )
        train_step(run)
        if run.state.step - 1 == poison:
            hook.remove()

    def validating(*arguments):
        seen.append(1)
        if len(seen) == end_in_validation:
            os.kill(os.getpid(), signal.SIGTERM)
        return mean_loss(*arguments)

    train.train_step, train.mean_loss = stepping, validating


if __name__ == "__main__":
    main()
