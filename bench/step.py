"""A training step on the CPU: time and memory against a plain step and transformers', and against the matrix peak.

python bench/step.py small        # 6 blocks x 384, vocabulary 50304, T 256, micro-batch 8, fp32; two minutes
python bench/step.py gpt2         # GPT-2 124M, T 1024, micro-batch 2; with activation checkpointing too

Ours is train.py's own `train_step` in a run built by run.py's `setup`. Memory is the peak of a process of its own that
makes two steps, less what it had after its imports. FLOPs are 6 per matmul parameter and 12 L C T for attention.
"""

import json
import os
import sys
import tempfile

import harness
import numpy as np
import torch
from harness import row
from plain import hugging_face, plain, random_batch

import train
from inheritune.base.files import write_json
from inheritune.data.reader import GPT2
from inheritune.training.cost import costs
from inheritune.training.device import pick
from inheritune.training.distributed import Ranks
from inheritune.training.planning import make_plan
from inheritune.training.settings import TrainSettings
from inheritune.training.setup import setup
from model import GPTConfig

SHAPES = {
    "small": (GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False), 8),
    "gpt2": (GPTConfig(bias=False), 2),
}  # with the micro-batch
BARS = {
    "small": {"plain": "<= 0.88", "transformers": "<= 0.80", "memory": "<= 0.55", "peak": ">= 85"},
    "gpt2": {"plain": "<= 0.88", "memory": "<= 0.75", "checkpointed": "<= 0.6"},
}


def make_data(folder, tokens=1_000_000):
    """A data folder of random ids."""
    for split in ("train", "val"):
        np.random.default_rng(1).integers(0, 50257, tokens).astype("<u2").tofile(os.path.join(folder, f"{split}.bin"))
    write_json(os.path.join(folder, "meta.json"), {"tokenizer": GPT2, "dtype": "uint16"})


def our_run(folder, shape, **changes):
    """The Run that train.py would make."""
    config, micro = SHAPES[shape]
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias")
    settings = TrainSettings(
        **{name: getattr(config, name) for name in names},
        dataset=folder,
        out_dir=os.path.join(folder, f"out-{len(os.listdir(folder))}"),
        batch_tokens=micro * config.block_size,
        batch_size=micro,
        warmup_iters=0,
        learning_rate=1e-3,
        min_lr=1e-3,
        device="cpu",
        **changes,
    )
    pick("cpu")
    return setup(settings, make_plan(settings, set(), 1), Ranks(), torch.device("cpu"))


def works(folder, shape, names):
    """{name: function that makes one training step}."""
    config, micro = SHAPES[shape]
    path = os.path.join(folder, "train.bin")
    made = {}
    for name in names:
        if name in ("none", "cheap", "full"):
            run = our_run(folder, shape, checkpoint_activations=name)
            made[name] = lambda run=run: train.train_step(run)
        elif name == "evaluation":  # of as many tokens
            run = our_run(folder, shape, eval_tokens=micro * config.block_size)
            made[name] = lambda run=run: train.validate(run)
        else:
            trainer = (plain if name == "plain" else hugging_face)(config)
            made[name] = lambda t=trainer: t.step(*random_batch(path, micro, config.block_size))
    return made


def matrix_peak():
    """What torch.mm reaches on square matrices, in FLOP/s."""
    a, b, out = (torch.randn(2048, 2048) for _ in range(3))
    times = [harness.seconds(lambda: torch.mm(a, b, out=out)) for _ in range(9)]
    return 2 * 2048**3 / sorted(times)[4]


def memory(shape, name):
    """MB that two steps need at most, in this fresh process."""
    if name == "transformers":
        import transformers

        transformers.GPT2LMHeadModel  # noqa: B018 (imports it)
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder)
        before = harness.memory_mb("VmRSS")
        (step,) = works(folder, shape, [name]).values()
        for _ in range(2):  # the second finds the optimizer's state there
            step()
        return harness.memory_mb() - before


def main(shape):
    """Measure and report one shape."""
    config, micro = SHAPES[shape]
    bars = BARS[shape]
    names = ["ours", "plain", *(["transformers"] if shape == "small" else ["checkpointed"])]
    peaks = {name: harness.in_own_process("step.py", shape, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder)
        steps = works(folder, shape, [*names, "evaluation"])
        gemm = []
        times = harness.interleaved(steps, prepare=lambda name: gemm.append(matrix_peak()) if name == "ours" else None)
    peak = sorted(gemm)[len(gemm) // 2]
    flops = costs(config)[1] * micro * config.block_size
    rows = [
        row(f"step {shape}: time", times["ours"], "s"),
        row(f"step {shape}: time / plain step", times["ours"] / times["plain"], "ratio", bars["plain"]),
        row(f"step {shape}: memory", peaks["ours"], "MB"),
        row(f"step {shape}: memory / plain step", peaks["ours"] / peaks["plain"], "ratio", bars["memory"]),
        row(f"step {shape}: matrix peak", peak / 1e9, "GFLOP/s"),
        row(f"step {shape}: share of matrix peak", 100 * flops / times["ours"] / peak, "%", bars.get("peak", "")),
        row(f"step {shape}: the plain step's share", 100 * flops / times["plain"] / peak, "%"),
    ]
    if shape == "small":
        rows.append(row("evaluation: tokens/s / training's", times["ours"] / times["evaluation"], "ratio", ">= 2.8"))
    other = names[-1]
    time, most = times[other] / times["plain"], peaks[other] / peaks["plain"]
    if other == "checkpointed":
        rows.append(row(f"step {shape}, checkpointed: time / plain step", time, "ratio"))
        rows.append(row(f"step {shape}, checkpointed: memory / plain step", most, "ratio", bars[other]))
    else:
        rows.append(row(f"step {shape}: time / {other}", times["ours"] / times[other], "ratio", bars[other]))
        rows.append(row(f"step {shape}: memory / {other}", peaks["ours"] / peaks[other], "ratio"))
    harness.report(rows)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(memory(*sys.argv[1:])))
    else:
        main(sys.argv[1])
