"""How long training stands still for a checkpoint, against writing the same checkpoint while it waits: GPT-2
124M with AdamW's moments on the CPU; and how much slower the steps are while the copy is being written.

python bench/saving.py        # on an otherwise idle machine; two minutes, 4.5 GB of disk, 6 GB of memory
"""

import os
import shutil
import tempfile

import harness  # first: it finds the other files
import numpy as np
import torch

import train
from inheritune.training import planning
from inheritune.training.command_line import parse
from inheritune.training.distributed import Ranks
from inheritune.training.optimizer import optimizer_tensors
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint

BAR = "<= 0.2"


def make_run(folder):
    """A run of GPT-2 124M on random tokens, after its first step; its steps are short beside a write."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(0, 50257, 20_000, dtype=np.uint16).tofile(os.path.join(folder, f"{split}.bin"))
    argv = f"--dataset={folder} --out_dir={folder}/out --device=cpu --block_size=128 --batch_size=1"
    argv += " --batch_tokens=128"
    settings, explicit = parse((TrainSettings,), argv.split(), "bench")
    run = train.Run(settings, planning.make_plan(settings, explicit, 1), Ranks(), torch.device("cpu"))
    train.train_step(run)
    return run


def plainly(run):
    """Write the same checkpoint, synchronously, from the tensors themselves."""
    state = {"step": run.state.step}
    config, module = run.plan.config, run.model.module
    weights = config.arrange(dict(module.named_parameters()))
    optimizer = optimizer_tensors(module, run.optimizer)
    rest = config.content(), state, run.saver.lineage, {}
    checkpoint.write_step(run.settings.out_dir, weights, optimizer, *rest)
    checkpoint.prune(run.settings.out_dir, 1, None)


def steps_while_writing(run):
    """Seconds of each step taken while a checkpoint is written."""
    train.save_checkpoint(run)
    times = []
    while not run.saver.newest.done():
        times.append(harness.seconds(lambda: train.train_step(run)))
    return times


def main():
    """Measure, print, and write the rows."""
    folder = tempfile.mkdtemp(dir=harness.ROOT, prefix=".bench-save-")
    try:
        run = make_run(folder)
        first = harness.seconds(lambda: train.save_checkpoint(run))

        def prepare(_):
            train.wait_for_checkpoint(run)
            os.sync()
            run.state.step += 1

        works = {"blocked": lambda: train.save_checkpoint(run), "plain": lambda: plainly(run)}
        times = harness.interleaved(works, prepare=prepare)
        prepare("")
        alone = np.median([harness.seconds(lambda: train.train_step(run)) for _ in range(7)])
        beside = steps_while_writing(run)
        train.wait_for_checkpoint(run)
        copied = sum(t.nbytes for t in run.saver.copies.values()) / 1e6
    finally:
        shutil.rmtree(folder)
    name, row = "checkpoint save, GPT-2 124M", harness.row
    blocked = times["blocked"] / times["plain"]
    harness.report(
        [
            row(f"{name}: training blocked, of a synchronous save", blocked, "ratio", BAR),
            row(f"{name}: the same for a run's first save", first / np.median(times["plain"]), "ratio"),
            row(f"{name}: synchronous", times["plain"], "s"),
            row(f"{name}: blocked", times["blocked"], "s"),
            row(f"{name}: memory of the copy", copied, "MB"),
            row(f"{name}: until written, beside steps", sum(beside), "s"),
            row(f"{name}: a step meanwhile, of one alone", np.array(beside) / alone, "ratio"),
        ]
    )


if __name__ == "__main__":
    main()
