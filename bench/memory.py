"""The estimate of training's memory (inheritune/training/cost.py) against what two steps take on the CPU,
within 10 %.

    python bench/memory.py

glibc is told to give freed tensors back to the system: the holes that it otherwise keeps are not what is
estimated.
"""

import os
import tempfile

import harness  # first: it finds the other files
from step import OURS, Contender, make_data

from inheritune.training.cost import training_memory
from model import GPTConfig

SHAPES = {
    "6 x 384, T 256, micro-batch 8": {
        **{"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
        **{"batch_size": 8, "batch_tokens": 2048},
    },
    "12 x 768, T 512, micro-batch 2, accumulated": {
        **{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512},
        **{"batch_size": 2, "batch_tokens": 2048},
    },
    "12 x 768, T 512, micro-batch 8": {
        **{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512},
        **{"batch_size": 8, "batch_tokens": 4096},
    },
}


def measure(sizes, how, folder):
    """(measured, estimated) memory of a step, in MB."""
    contender = Contender(sizes, how, folder)
    contender.seconds()
    contender.seconds()  # the second finds the optimizer's state there
    contender.close()
    config = GPTConfig(bias=False, **{k: v for k, v in sizes.items() if not k.startswith("batch")})
    accumulation = sizes["batch_tokens"] // (sizes["batch_size"] * config.block_size)
    terms = training_memory(config, sizes["batch_size"], accumulation, half=False, checkpoint_activations=how)
    return contender.memory, sum(terms.values()) / 1e6


def main():
    """Measure all shapes, print, and write the rows."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # bytes
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder)
        for shape, sizes in SHAPES.items():
            for how in OURS:
                measured, estimated = measure(sizes, how, folder)
                name = f"training memory, {shape}, {how}"
                rows.append(harness.row(f"{name}: measured", measured, "MB"))
                rows.append(harness.row(f"{name}: estimated", estimated, "MB"))
                rows.append(harness.row(f"{name}: off by", abs(estimated / measured - 1), "ratio", "<= 0.1"))
                harness.show(rows[-3:])
    harness.report(rows)


if __name__ == "__main__":
    main()
