"""plan.py's estimate of training's memory against what steps take on the CPU: peak RSS less RSS after imports, each
shape in a process of its own, within 10 %.

python bench/memory.py

glibc is told to give freed tensors back to the system: the holes that it otherwise keeps are not what is estimated.
"""

import json
import os
import shutil
import sys
import tempfile

import harness  # first: it finds the other files
import numpy as np

SHAPES = {  # blocks, heads, width, context, micro-batch, accumulation, checkpointed activations
    "6 x 384, T 256, micro-batch 8": (6, 6, 384, 256, 8, 1, False),
    "12 x 768, T 512, micro-batch 2, accumulated": (12, 12, 768, 512, 2, 2, False),
    "12 x 768, T 512, micro-batch 4, checkpointed": (12, 12, 768, 512, 4, 1, True),
}
NAMES = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")


def arguments(shape, folder):
    """The command line for train.py of one shape."""
    *sizes, accumulation, checkpointed = shape
    values = dict(zip(NAMES, sizes, strict=True)) | {"batch_tokens": shape[3] * shape[4] * accumulation}
    values |= {"dataset": folder, "out_dir": f"{folder}/out", "device": "cpu", "eval_tokens": 2000}
    values["checkpoint_activations"] = checkpointed
    return [f"--{name}={value}" for name, value in values.items()]


def measure(argv):
    """{"measured": MB, "estimated": MB} of two steps."""
    import torch
    import torch._dynamo  # as the first step would

    import train
    from inheritune.training import planning
    from inheritune.training.distributed import Ranks
    from inheritune.training.parsing import parse
    from inheritune.training.settings import TrainSettings

    before = harness.memory_mb("VmRSS")
    settings, given = parse((TrainSettings,), argv, "bench")
    plan = planning.make_plan(settings, given, 1)
    run = train.setup(settings, plan, Ranks(), torch.device("cpu"))
    for _ in range(2):
        train.train_step(run)
    how = {"half": False, "checkpointed": settings.checkpoint_activations}
    estimated = planning.training_memory(plan.config, plan.micro_batch, plan.accumulation, **how)
    return {"measured": harness.memory_mb() - before, "estimated": estimated / 1e6}


def main():
    """Measure all shapes, print, and write the rows."""
    folder = tempfile.mkdtemp()
    rows = []
    try:
        for split in ("train", "val"):
            ids = np.random.default_rng(0).integers(0, 50257, 100_000, dtype=np.uint16)
            ids.tofile(os.path.join(folder, f"{split}.bin"))
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # bytes
        for name, shape in SHAPES.items():
            found = harness.in_own_process("memory.py", *arguments(shape, folder))
            off = abs(found["estimated"] / found["measured"] - 1)
            rows.append(harness.row(f"training memory, {name}: measured", found["measured"], "MB"))
            rows.append(harness.row(f"training memory, {name}: estimated", found["estimated"], "MB"))
            rows.append(harness.row(f"training memory, {name}: off by", off, "ratio", "<= 0.1"))
    finally:
        shutil.rmtree(folder)
    harness.report(rows)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:]))) if sys.argv[1:] else main()
