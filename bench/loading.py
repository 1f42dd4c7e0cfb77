"""Data loading: what a batch costs of a training step, memory and first batch on a bin of 200 GB, and how
long train.py takes to its first step.

python bench/loading.py        # a minute

The step is that of a model of 6 layers × 384 on micro-batches of 8 × 256 tokens. A step of 480 × 1024 tokens,
too long for a CPU, is counted at as much per token (its longer context would make it longer still).
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import harness
import numpy as np
import torch

from inheritune.data.reader import TrainData
from inheritune.training.losses import to_device
from inheritune.training.optimizer import make_optimizer
from inheritune.training.settings import TrainSettings
from model import GPT, GPTConfig

SIZES = ((8, 256), (480, 1024))
FIRST_STEP = (
    "--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_tokens=512 --batch_size=8 --eval_tokens=64 "
    "--warmup_iters=1 --log_interval=1 --max_iters=1000 --device=cpu"
)


def write_bin(folder, tokens, splits=("train",), sparse=False):
    """A data folder whose bins have `tokens` random ids each, or are one hole."""
    os.mkdir(folder)
    for split in splits:
        with open(os.path.join(folder, f"{split}.bin"), "wb") as f:
            if sparse:
                f.truncate(2 * tokens)
            else:
                np.random.default_rng(0).integers(0, 50257, tokens, dtype="<u2").tofile(f)
    meta = {"tokenizer": {"name": "gpt2", "n_vocab": 50257, "eot": 50256}, "dtype": "uint16"}
    meta["splits"] = {split: {"shards": [{"file": f"{split}.bin", "tokens": tokens}]} for split in splits}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f)


def make_works(folder):
    """{name: function}: one training step of 8 × 256, and one batch of each of SIZES, every one at another
    place."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384))
    optimizer = make_optimizer(model, TrainSettings(), torch.device("cpu"))
    readers = {size: TrainData(folder, size[1], seed=1) for size in SIZES}
    calls = iter(range(10**9))
    works = {size: lambda size=size: readers[size].batch(next(calls) * size[0], size[0]) for size in SIZES}
    x, y = to_device(works[SIZES[0]](), torch.device("cpu"))

    def step():
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"step": step, **works}


def measure_huge(folder):
    """Print, as JSON, the seconds to the first batch of a bin of 200 GB, and the MB by which memory then
    grows over 2,000 batches of 48 × 1024 tokens."""
    began = time.perf_counter()
    reader = TrainData(folder, 1024, seed=1)
    reader.batch(0, 48)
    first = time.perf_counter() - began
    before = harness.memory_mb("VmRSS")
    for i in range(1, 2001):
        reader.batch(i * 48, 48)
    print(json.dumps([first, harness.memory_mb("VmRSS") - before]))


def first_step(folder):
    """Run train.py until it has printed its first step."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "train.py",
            f"--dataset={folder}",
            f"--out_dir={out}/out",
            *FIRST_STEP.split(),
        ]
        with subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True) as process:
            reached = any(line.startswith("step 1/") for line in process.stdout)
            process.kill()
    if not reached:
        sys.exit("train.py ended before its first step")


def main():
    """Measure all, print and keep the rows."""
    if sys.argv[1:]:
        measure_huge(sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as place:
        full, huge, small = (os.path.join(place, name) for name in ("full", "huge", "small"))
        write_bin(full, 200_000_000)
        write_bin(huge, 100_000_000_000, sparse=True)
        write_bin(small, 10_000, splits=("train", "val"))
        times = harness.interleaved(make_works(full), rounds=9)
        first, grown = harness.in_own_process("loading.py", huge)
        starting = {
            "train.py": lambda: first_step(small),
            "torch": lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True),
        }
        start = harness.interleaved(starting)
    per_token = times["step"] / (SIZES[0][0] * SIZES[0][1])
    rows = []
    for B, T in SIZES:
        name = f"a batch of {B} x {T} tokens"
        rows.append(harness.row(name, times[B, T] * 1e3, "ms"))
        share = times[B, T] / (per_token * B * T) * 100
        rows.append(harness.row(f"{name}: share of its step", share, "%", "<= 1"))
    rows.append(harness.row("first batch of a 200 GB bin, after the imports", first, "s", "<= 1"))
    rows.append(harness.row("memory grown over 2,000 batches of a 200 GB bin", grown, "MB", "<= 10"))
    rows.append(harness.row("import torch", start["torch"], "s"))
    beyond = start["train.py"] - start["torch"]
    rows.append(harness.row("train.py's first step, beyond import torch", beyond, "s", "<= 4"))
    harness.report(rows)


if __name__ == "__main__":
    main()
