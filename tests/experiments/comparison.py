"""A small comparison for replicate.py and what the tests of the arms ask of it."""

import replicate
import train
from inheritune.training.command_line import parse
from inheritune.training.settings import ReplicateSettings, TrainSettings
from tests.tiny import write_data

TRAINING = """
batch_tokens = 64
batch_size = 8
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 3
"""
REFERENCE = f"""{TRAINING}
n_layer = 4
n_head = 2
n_embd = 16
block_size = 8
max_iters = 12
eval_interval = 4
"""
SMALL = f"""{TRAINING}
eval_tokens = 200
threads = 1
device = "cpu"
"""
COMPARISON = f"""{SMALL}
layers = 2
rounds_from = 1
rounds_step = 1
seen = 0.5
max_iters = 6
eval_interval = 3
jobs = 1
"""


def in_process(request, command, stdout=None, stderr=None):
    """StopRequest.call for train.py, without the process."""
    train.main(command[2:])
    return 0


def write_config(folder, **changes):
    """A data folder, a reference config and a comparison in `folder`; returns the comparison's path."""
    data = write_data(folder / "data", val=600)
    (folder / "reference.py").write_text(REFERENCE)
    lines = {"dataset": data, "out_dir": str(folder / "out"), "results": str(folder / "results")}
    lines |= {"reference_config": str(folder / "reference.py"), "arms": "all:1", **changes}
    (folder / "c.py").write_text(COMPARISON + "".join(f"{k} = {v!r}\n" for k, v in lines.items()))
    return str(folder / "c.py")


def common_of(path, *flags):
    """What the arms of a comparison's first seed share."""
    settings, rep, explicit = parse((TrainSettings, ReplicateSettings), [path, *flags], "")
    pairs, _ = replicate.plan_comparison(settings, rep, explicit)
    return pairs[0][1]
