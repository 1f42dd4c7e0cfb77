"""A model in shards (--shard) trains like one that is whole, and is continued as one."""

import pytest

import train
from inheritune.weights import checkpoint
from tests.tiny import alike, arguments, column, contents, write_checkpoint

# gradients are clipped, accumulated, and of a width that 4 ranks cannot share evenly
LIKE = {"grad_clip": 0.5, "batch_size": 1, "n_embd": 18, "keep_last": 9}


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """The run folder of twelve steps in one process (where shard=True changes nothing)."""
    out = str(tmp_path_factory.mktemp("one") / "out")
    train.main(arguments(data, out, **LIKE, shard=True))
    return out


@pytest.fixture
def on_ranks(forks, data, tmp_path):

    def run(world, name, code="", status=0, **changes):
        argv = arguments(data, tmp_path / name, **LIKE | changes)
        assert forks.train(argv, world=world, code=code)[0] == status, forks.printed
        return tmp_path / name

    return run


def test_two_ranks_with_shards_are_one_run(one, on_ranks):
    alike(on_ranks(2, "shards", shard=True), one)


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_from_any_other(one, on_ranks):
    """2 → 4 → 1 ranks in shards; and in shards → DDP → in shards."""
    for name, runs in (("a", ((2, True), (4, True), (1, True))), ("b", ((2, True), (4, False), (2, True)))):
        for steps, (world, shard) in zip((4, 8, 12), runs, strict=True):
            part = {"max_iters": steps, "lr_decay_iters": 12, "resume": "auto", "shard": shard}
            out = on_ranks(world, name, **part)
        alike(out, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        *({"dtype": "bfloat16"}, {"dtype": "float16"}, {"teacher": True}, {"dropout": 0.1}),
        *({"checkpoint_activations": "full"}, {"checkpoint_activations": "cheap", "compile": True}),
    ],
)
def test_shards_do_what_ddp_does(tmp_path, on_ranks, change):
    """In 16 bits shards round the residual stream too."""
    if "teacher" in change:
        write_checkpoint(tmp_path / "teacher", seed=5, bias=False)
        change = {"teacher": str(tmp_path / "teacher")}
    shards, ddp = (on_ranks(2, f"{shard}", shard=shard, **change) for shard in (True, False))
    alike(shards, ddp, atol=2e-2 if "dtype" in change else 1e-5)


@pytest.mark.slow
def test_weights_travel_in_16_bits_and_gradients_in_32(on_ranks):
    code = """
    import torch
    import torch.distributed as dist
    sent = {}
    def noting(kind, call):
        def noted(output, input, *rest, **options):
            sent.setdefault(kind, set()).add(input.dtype)
            return call(output, input, *rest, **options)
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
    on_ranks(2, "a", code, dtype="bfloat16", shard=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_so_on_all(on_ranks, dtype):
    """... and the loss scale falls on all."""
    code = """
    hooks = []
    def poisoned(run):
        poison = lambda m, i, loss: loss.register_hook(lambda g: g * float("inf")) and None
        if rank == 1 and run.state.step == 5:
            hooks.append(run.model.module.register_forward_hook(poison))
        step(run)
        while hooks:
            hooks.pop().remove()
    train.train_step = poisoned
    """
    shards, ddp = (on_ranks(2, f"{shard}", code, dtype=dtype, shard=shard) for shard in (True, False))
    alike(shards, ddp, atol=2e-2 if dtype == "float16" else 1e-5)
    one, two = (checkpoint.read_state(str(out / "latest")) for out in (shards, ddp))
    assert one["bad_steps"] == two["bad_steps"] == 1 and one["scaler"] == two["scaler"]


@pytest.mark.slow
def test_shards_asked_to_end_or_at_their_goal_save_and_go_on(on_ranks):
    """In a validation, of which ranks have unequal shares; and what is saved after a validation is whole."""
    code = """
    import os, signal
    mean_loss, seen = train.mean_loss, []
    def validating(*arguments):
        seen.append(1)
        if rank == 1 and len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return mean_loss(*arguments)
    train.mean_loss = validating
    """
    more = {"eval_tokens": 390, "batch_size": 2, "save_interval": 6, "shard": True, "resume": "auto"}
    whole = contents(on_ranks(2, "whole", **more))
    on_ranks(2, "asked", code, status=143, **more)
    found = contents(on_ranks(2, "asked", **more))
    assert {key: found.get(key) for key in whole} == whole
    more["stop_at_val_loss"] = column(on_ranks(2, "whole", **more), "val_loss")[2] + 1e-6
    shards, ddp = (on_ranks(2, f"{shard}", **more | {"shard": shard}) for shard in (True, False))
    assert checkpoint.list_steps(shards)[-1] == "step_00000008"
    alike(shards, ddp)
