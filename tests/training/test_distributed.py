"""Two ranks under torchrun: what one of them meets alone, and what all of them must agree on.

pytest tests/training/test_distributed.py
"""

import os
import shutil
import socket
import subprocess
import sys
import textwrap

import pytest

from inheritune.base.errors import UserError
from inheritune.training.distributed import Ranks
from tests.tiny import ROOT, arguments, contents

DRIVER = """
import os, sys, torch
import train
from inheritune.base.errors import UserError
from inheritune.weights import checkpoint
rank, step = int(os.environ["RANK"]), train.train_step
{code}
train.main(sys.argv[1:])
"""


def two_ranks(tmp_path, argv, code=""):
    """train.py on two ranks that have run `code` before; the finished process."""
    path = tmp_path / "driver.py"
    path.write_text(DRIVER.format(code=textwrap.dedent(code)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *torchrun, str(path), *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "error, said",
    [
        ("UserError('its disk is gone')", "driver.py: rank 1: its disk is gone\n"),
        ("OSError(5, 'Input/output error', 'x.bin')", "driver.py: rank 1: Input/output error (x.bin)"),
        ("torch.OutOfMemoryError('of its GPU')", "driver.py: rank 1: Traceback (most recent call last)"),
    ],
)
def test_what_one_rank_alone_meets_it_prints_with_its_number(data, tmp_path, error, said):
    """... at once, while the other waits for it in a collective."""
    code = f"""
    def failing(run):
        if rank == 1 and run.state.step == 3:
            raise {error}
        step(run)
    train.train_step = failing
    """
    done = two_ranks(tmp_path, arguments(data, tmp_path / "out"), code)
    assert done.returncode and said in done.stderr, done.stderr
    assert "gone" not in error or done.stderr.count("gone") == 1


def test_what_all_ranks_meet_is_said_once(data, tmp_path):
    code = "train.MAX_BAD_STEPS = 0"  # the first step is one too many
    done = two_ranks(tmp_path, arguments(data, tmp_path / "out"), code)
    assert done.returncode and done.stderr.count("steps in a row without a finite loss") == 1
    assert "\ntrain.py: 0 steps in a row" in "\n" + done.stderr


def test_rank_0_decides_which_checkpoint_is_resumed(data, tmp_path):
    """The other lists the run folder without its newest checkpoint, as a network disk may show it."""
    out, whole = str(tmp_path / "out"), str(tmp_path / "whole")
    assert two_ranks(tmp_path, arguments(data, whole, keep_last=9)).returncode == 0
    shutil.copytree(whole, out, symlinks=True)
    shutil.rmtree(f"{out}/step_00000012")
    code = """
    steps = checkpoint.list_steps
    checkpoint.list_steps = lambda run: steps(run)[: None if rank == 0 else -1]
    """
    done = two_ranks(tmp_path, arguments(data, out, keep_last=9, resume="must"), code)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole)


def test_ddp_keeps_its_gradients_in_its_buckets(data, tmp_path):
    """Let go of after a step, they would be made anew beside the buckets by the next step's accumulation."""
    code = """
    def checked(run):
        step(run)
        found = [p.grad.data_ptr() for p in run.model.module.parameters()]
        if run.state.step > 1:  # the first step tells DDP in which order to fill them
            assert found == seen.setdefault("grads", found)
        assert not any(p.grad.any() for p in run.model.module.parameters())
    seen = {}
    train.train_step = checked
    """
    done = two_ranks(tmp_path, arguments(data, tmp_path / "out", batch_size=1, max_iters=4), code)
    assert done.returncode == 0, done.stderr


def two_agents(tmp_path, argv):
    """The exit statuses and errors of two torchruns with a rank each, as on two machines, in which a rank of
    either is killed once. The other then waits until its torchrun ends it, as in NCCL: that restart is not
    counted."""
    code = """
    import signal, time
    os._exit = lambda status: signal.signal(signal.SIGTERM, signal.SIG_DFL) and time.sleep(99)
    def dying(run):
        agent = os.environ["AGENT"]
        if run.state.step == {"0": 5, "1": 9}[agent] and not os.path.exists(agent):
            open(agent, "w").close()
            os.kill(os.getpid(), 9)
        step(run)
    train.train_step = dying
    """
    (tmp_path / "driver.py").write_text(DRIVER.format(code=textwrap.dedent(code)))
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    how = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--max-restarts=2",
        "--monitor-interval=0.2",
        "--rdzv_id=x",
    ]
    how += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--local-addr=localhost", "driver.py"]
    env = os.environ | {"PYTHONPATH": ROOT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *how, *argv],
            cwd=tmp_path,
            env=env | {"AGENT": str(agent)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for agent in (0, 1)
    ]
    try:
        said = [agent.communicate(timeout=200)[1] for agent in agents]
    finally:
        for agent in agents:  # which end their ranks
            agent.terminate()
            agent.wait()
    return [agent.returncode for agent in agents], "".join(said)


@pytest.mark.slow
def test_two_agents_restart_after_either_has_lost_a_rank(data, tmp_path):
    argv = arguments(data, tmp_path / "out", keep_last=9, resume="auto")
    statuses, said = two_agents(tmp_path, argv)
    assert statuses == [0, 0], said
    assert os.path.exists(tmp_path / "0") and os.path.exists(tmp_path / "1")
    assert two_ranks(tmp_path, arguments(data, tmp_path / "whole", keep_last=9)).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_restarts_that_could_not_work_are_refused_at_the_start(monkeypatch):
    """The torchruns of two machines count restarts each for itself: under names made of that their ranks
    would wait for each other."""
    where = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    where |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "GROUP_WORLD_SIZE": "2",
    }
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        Ranks(1, 2).join("cpu")
