"""Two ranks: one run, what one of them meets alone, and what all of them must agree on."""

import subprocess
import sys

import pytest

import train
from inheritune.base.errors import UserError
from inheritune.training.distributed import Ranks
from inheritune.weights import checkpoint
from tests.tiny import ROOT, alike, arguments, contents, cut

LIKE = {"batch_size": 2, "keep_last": 9}


@pytest.fixture(scope="module")
def whole(forks, data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("two") / "out")
    assert forks.train(arguments(data, out, **LIKE), world=2)[0] == 0, forks.printed
    return out


def test_two_ranks_are_one_run(whole, data, tmp_path):
    """... and one rank goes on where two have stopped."""
    train.main(arguments(data, tmp_path / "one", **LIKE))
    alike(whole, tmp_path / "one")
    assert (tmp_path / "one/log.csv").read_text().split()[:2] == open(f"{whole}/log.csv").read().split()[:2]
    train.main(arguments(data, cut(whole, tmp_path / "continued", 4), **LIKE, resume="must"))
    alike(tmp_path / "continued", whole)


def test_torchrun_starts_two_ranks(whole, data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "train.py", *arguments(data, tmp_path / "out", **LIKE)], cwd=ROOT)
    assert done.returncode == 0 and contents(tmp_path / "out") == contents(whole)


def test_rank_0_decides_which_checkpoint_is_resumed(forks, whole, data, tmp_path):
    """The other lists the run folder without its newest checkpoint, as a network disk may show it."""
    code = """
    from inheritune.weights import checkpoint
    steps = checkpoint.list_steps
    checkpoint.list_steps = lambda run: steps(run)[: None if rank == 0 else -1]
    """
    out = cut(whole, tmp_path / "out", 8)
    assert forks.train(arguments(data, out, **LIKE, resume="must"), world=2, code=code)[0] == 0, forks.printed
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    "error, said",
    [
        ("UserError('its disk is gone')", "tiny.py: rank 1: its disk is gone\n"),
        (
            "torch.OutOfMemoryError('CUDA out of memory')",
            "tiny.py: rank 1: the GPU has no memory left: a lower --batch_size",
        ),
        (
            "torch._inductor.exc.InductorError(RuntimeError('Failed to find C compiler'), None)",
            "tiny.py: rank 1: torch.compile finds no C++ compiler here",
        ),
        ("OSError(5, 'Input/output error', 'x.bin')", "tiny.py: rank 1: Input/output error (x.bin)"),
        ("KeyboardInterrupt", "tiny.py: rank 1: interrupted twice, ended at once\n"),
        ("RuntimeError('out of memory')", "tiny.py: rank 1: Traceback (most recent call last)"),
    ],
)
def test_what_one_rank_alone_meets_it_prints_with_its_number(forks, data, tmp_path, error, said):
    """... at once, while the other waits for it in a collective."""
    code = f"""
    import torch._inductor.exc
    from inheritune.base.errors import UserError
    def failing(run):
        if rank == 1 and run.state.step == 3:
            raise {error}
        step(run)
    train.train_step = failing
    """
    assert forks.train(arguments(data, tmp_path / "out"), world=2, code=code)[0] == 1
    assert said in forks.printed


def test_what_all_ranks_meet_is_said_once(forks, data, tmp_path):
    argv = arguments(data, tmp_path / "out", init_from=tmp_path)
    assert forks.train(argv, world=2)[0] == 1 and "is neither a checkpoint" in forks.said
    code = "train.MAX_BAD_STEPS = 0"  # the first step is one too many
    assert forks.train(arguments(data, tmp_path / "out"), world=2, code=code)[0] == 1
    assert forks.said.startswith("train.py: 0 steps in a row") and "rank 1" not in forks.printed


def test_a_signal_to_one_rank_stops_all_at_the_same_step(forks, whole, data, tmp_path):
    out = str(tmp_path / "out")
    code = """
    import os, signal
    def asked(run):
        if rank == 1 and run.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        step(run)
    train.train_step = asked
    """
    assert forks.train(arguments(data, out, **LIKE), world=2, code=code)[0] == 143
    assert checkpoint.list_steps(out)[-1] == "step_00000006"
    assert forks.printed.count("train.py: SIGTERM: saved ") == 1
    assert forks.train(arguments(data, out, **LIKE, resume="auto"), world=2)[0] == 0
    assert {name: contents(out).get(name) for name in contents(whole)} == contents(whole)


def test_ddp_keeps_its_gradients_in_its_buckets(forks, data, tmp_path):
    """Let go of after a step, they would be made anew beside the buckets by the next step's accumulation."""
    code = """
    seen = {}
    def checked(run):
        step(run)
        found = [p.grad.data_ptr() for p in run.model.module.parameters()]
        if run.state.step > 1:  # the first step tells DDP in which order to fill them
            assert found == seen.setdefault("grads", found)
        assert not any(p.grad.any() for p in run.model.module.parameters())
    train.train_step = checked
    """
    argv = arguments(data, tmp_path / "out", batch_size=1, max_iters=4)
    assert forks.train(argv, world=2, code=code)[0] == 0, forks.printed


def test_restarts_that_could_not_work_are_refused_at_the_start(monkeypatch):
    """The torchruns of two machines count restarts each for itself: under names made of that their ranks
    would wait for each other."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in (place | {"GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        Ranks(1, 2).join("cpu")
