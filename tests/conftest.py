"""What is set before torch is imported: one thread (the bits of a sum depend on their number), and no hub to
wait for; and what several files of tests train on, kill and compare with."""

import os
import signal

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have begun us with SIGINT ignored
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # the tests themselves are one process
    os.environ.pop(name, None)

import pytest  # noqa: E402

import train  # noqa: E402
from tests.tiny import Forks, arguments, write_data  # noqa: E402


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def plain(data, tmp_path_factory):
    """The run folder of a plain run of twelve steps."""
    out = str(tmp_path_factory.mktemp("plain") / "out")
    train.main(arguments(data, out))
    return out


@pytest.fixture(scope="session")
def forks():
    server = Forks()
    yield server
    server.close()
