"""The estimate of training's memory (inheritune/training/cost.py) against what three steps take on the CPU,
within 10 %: alone and on two ranks, with and without a teacher.

    python bench/memory.py

glibc is told to give freed tensors back to the system: the holes that it otherwise keeps are not what is
estimated.
"""

import dataclasses
import itertools
import os
import socket
import tempfile

import harness  # first: it finds the other files
from step import OURS, Contender, make_data

from inheritune.training.cost import training_memory
from inheritune.training.planning import Plan
from inheritune.training.settings import TrainSettings
from inheritune.weights.gpt2_format import arrange, config_json, write_model
from model import GPT, GPTConfig

SHAPES = {
    "6 x 384, T 256, micro-batch 4": {
        **{"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
        **{"batch_size": 4, "batch_tokens": 2048},
    },
    "12 x 768, T 256, micro-batch 2": {
        **{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 256},
        **{"batch_size": 2, "batch_tokens": 1024},
    },
}
TEACHER = GPTConfig(n_layer=12, n_head=6, n_embd=384, block_size=256, bias=False)
STEPS = 3  # the optimizer's state is there from the second on, and DDP's final buckets


def measure(sizes, how, folder, ranks, teacher):
    """Memory of the fullest rank after some steps, in MB."""
    with socket.socket() as s:
        s.bind(("", 0))
        place = {"WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": s.getsockname()[1]}
    sizes = sizes | {"teacher": teacher, "out_dir": os.path.join(tempfile.mkdtemp(dir=folder), "out")}
    contenders = []
    for rank in range(ranks):
        env = {key: str(value) for key, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        contenders.append(Contender(sizes, how, folder, env=env))
    for _ in range(STEPS):
        for contender in contenders:
            contender.start()
        for contender in contenders:
            contender.answer()
    for contender in contenders:
        contender.close()
    return max(contender.memory for contender in contenders)


def estimate(sizes, how, ranks, teacher):
    """The same as the formula has it."""
    config = GPTConfig(bias=False, **{k: v for k, v in sizes.items() if not k.startswith("batch")})
    accumulation = sizes["batch_tokens"] // (sizes["batch_size"] * config.block_size * ranks)
    batch = {"micro_batch": sizes["batch_size"], "accumulation": accumulation}
    plan = Plan(ranks, config, TEACHER if teacher else None, **batch)
    settings = TrainSettings(checkpoint_activations=how, device="cpu", dtype="float32")
    return sum(training_memory(plan, settings).values()) / 1e6


def write_teacher(folder):
    """A checkpoint of the teacher, with random weights."""
    os.mkdir(folder)
    state = arrange(dict(GPT(TEACHER).named_parameters()), dataclasses.asdict(TEACHER))
    write_model(folder, state, config_json(dataclasses.asdict(TEACHER)), {})
    return folder


def main():
    """Measure all shapes, print, and write the rows."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # bytes
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder)
        there = write_teacher(os.path.join(folder, "teacher"))
        small, large = SHAPES
        cases = [*itertools.product([small], (1, 2), ("", there), OURS)]
        cases += itertools.product([large], (1, 2), ("",), OURS)
        for shape, ranks, teacher, how in cases:
            sizes = SHAPES[shape]
            measured = measure(sizes, how, folder, ranks, teacher)
            estimated = estimate(sizes, how, ranks, teacher)
            name = f"training memory, {shape}, {ranks} rank(s){', teacher' * bool(teacher)}, {how}"
            rows.append(harness.row(f"{name}: measured", measured, "MB"))
            rows.append(harness.row(f"{name}: estimated", estimated, "MB"))
            rows.append(harness.row(f"{name}: off by", abs(estimated / measured - 1), "ratio", "<= 0.1"))
            harness.show(rows[-3:])
    harness.report(rows)


if __name__ == "__main__":
    main()
