"""Data loading: what a batch costs of a training step, and memory and first batch on a bin of 200 GB.

python bench/loading.py        # half a minute

The step is that of a model of 6 layers × 384 on micro-batches of 8 × 256 tokens. A step of 480 × 1024 tokens, too long
for a CPU, is counted at as much per token (its longer context would make it longer still).
"""

import json
import os
import sys
import tempfile
import time

import harness
import numpy as np
import torch

from inheritune.data.reader import TrainData
from inheritune.training.optimizer import make_optimizer
from inheritune.training.settings import TrainSettings
from model import GPT, GPTConfig

SIZES = ((8, 256), (480, 1024))


def write_bin(folder, tokens, sparse):
    """A data folder whose train.bin has `tokens` random ids, or is one hole."""
    os.mkdir(folder)
    with open(os.path.join(folder, "train.bin"), "wb") as f:
        if sparse:
            f.truncate(2 * tokens)
        else:
            np.random.default_rng(0).integers(0, 50257, tokens, dtype="<u2").tofile(f)
    meta = {"tokenizer": {"name": "gpt2", "n_vocab": 50257, "eot": 50256}, "dtype": "uint16"}
    meta["splits"] = {"train": {"shards": [{"file": "train.bin", "tokens": tokens}]}}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f)


def make_works(folder):
    """{name: function}: one training step of 8 × 256, and one batch of each of SIZES, every one of another place."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384))
    optimizer = make_optimizer(model, TrainSettings(), torch.device("cpu"))
    readers = {size: TrainData(folder, size[1], seed=1) for size in SIZES}
    calls = iter(range(10**9))
    works = {size: lambda size=size: readers[size].batch(next(calls) * size[0], size[0]) for size in SIZES}
    x, y = works[SIZES[0]]()

    def step():
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"step": step, **works}


def measure_huge(folder):
    """Print, as JSON, the seconds to the first batch of a bin of 200 GB, and the MB by which memory then grows over
    2,000 batches of 48 × 1024 tokens."""
    began = time.perf_counter()
    reader = TrainData(folder, 1024, seed=1)
    reader.batch(0, 48)
    first = time.perf_counter() - began
    before = harness.memory_mb("VmRSS")
    for i in range(1, 2001):
        reader.batch(i * 48, 48)
    print(json.dumps([first, harness.memory_mb("VmRSS") - before]))


def main():
    """Measure all, print and keep the rows."""
    if sys.argv[1:]:
        measure_huge(sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as place:
        write_bin(os.path.join(place, "full"), 200_000_000, sparse=False)
        write_bin(os.path.join(place, "huge"), 100_000_000_000, sparse=True)
        times = harness.interleaved(make_works(os.path.join(place, "full")), rounds=9)
        first, grown = harness.in_own_process("loading.py", os.path.join(place, "huge"))
    per_token = times["step"] / (SIZES[0][0] * SIZES[0][1])
    rows = []
    for B, T in SIZES:
        name = f"a batch of {B} x {T} tokens"
        rows.append(harness.row(name, times[B, T] * 1e3, "ms"))
        rows.append(harness.row(f"{name}: share of its step", times[B, T] / (per_token * B * T) * 100, "%", "<= 1"))
    rows.append(harness.row("first batch of a 200 GB bin, after the imports", first, "s", "<= 1"))
    rows.append(harness.row("memory grown over 2,000 batches of a 200 GB bin", grown, "MB", "<= 10"))
    harness.report(rows)


if __name__ == "__main__":
    main()
