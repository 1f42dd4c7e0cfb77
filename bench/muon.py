"""How many steps does Muon need for the loss that AdamW ends with? Small trainings on CPython's documentation.

    python bench/muon.py        # three seeds; about half an hour on one core

For each seed AdamW is trained for STEPS steps, and Muon for shares of that, each with its whole schedule; the share
that counts is the smallest whose validation loss is not above AdamW's. Both learning rates are the best of RATES for
seed 0, which does not count. Wall time is the share times the ratio of the step times, measured by themselves.
"""

import contextlib
import io
import os
import statistics
import tempfile

import harness
import torch
from harness import row

import prepare
import train
from inheritune.training.distributed import Ranks
from inheritune.training.logs import read_rows
from inheritune.training.parsing import parse
from inheritune.training.planning import make_plan
from inheritune.training.settings import TrainSettings
from inheritune.training.setup import setup

STEPS = 500
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 96, "block_size": 128}


def command(place, out, optimizer, steps, rate, seed):
    """The command line of a run into folder `out`."""
    values = SHAPE | {
        "dataset": os.path.join(place, "data"),
        "out_dir": out,
        "optimizer": optimizer,
        "batch_tokens": 2048,
        "batch_size": 16,
        "max_iters": steps,
        "learning_rate": rate,
        "min_lr": rate / 10,
        "warmup_iters": 20,
        "eval_interval": steps,
        "eval_tokens": 100_000,
        "log_interval": steps,
        "device": "cpu",
        "threads": 1,
        "seed": seed,
    }
    return [f"--{k}={v}" for k, v in values.items()]


def final(place, *how):
    """The validation loss (nats/token) at the end of a run with these settings."""
    out = os.path.join(place, "-".join(map(str, how)))
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(command(place, out, *how))
    return float(read_rows(os.path.join(out, "log.csv"))[-1]["val_loss"])


def step_ratio(place, rates):
    """Time of a step with Muon / with AdamW."""
    works = {}
    for optimizer in ("adamw", "muon"):
        argv = command(place, os.path.join(place, f"time-{optimizer}"), optimizer, 1000, rates[optimizer], 0)
        s, given = parse((TrainSettings,), argv, "")
        run = setup(s, make_plan(s, given, 1), Ranks(), torch.device("cpu"))
        works[optimizer] = lambda run=run: [train.train_step(run) for _ in range(5)]
    times = harness.interleaved(works)
    return times["muon"] / times["adamw"]


def main():
    """Choose the rates, train, report."""
    with tempfile.TemporaryDirectory() as place:
        prepare.main(["--out", os.path.join(place, "data")])

        def best_rate(optimizer):
            losses = {rate: final(place, optimizer, STEPS, rate, 0) for rate in RATES}
            print(f"{optimizer}: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in losses.items()), flush=True)
            return min(losses, key=losses.get)

        rates = {optimizer: best_rate(optimizer) for optimizer in ("adamw", "muon")}
        needed = []
        for seed in (1, 2, 3):
            goal = final(place, "adamw", STEPS, rates["adamw"], seed)
            print(f"seed {seed}: adamw {STEPS} steps {goal:.4f}", flush=True)
            for share in SHARES:
                loss = final(place, "muon", round(share * STEPS), rates["muon"], seed)
                print(f"seed {seed}: muon {share:.0%} of them {loss:.4f}", flush=True)
                if loss <= goal:
                    break
            needed.append(100 * share if loss <= goal else float("inf"))
        ratio = step_ratio(place, rates)
    harness.report(
        [
            row("muon: steps for AdamW's final loss, worst of 3 seeds", max(needed), "%", "<= 70"),
            row("muon: steps for AdamW's final loss, median", statistics.median(needed), "%"),
            row("muon: time of a step / AdamW's", ratio, "ratio"),
            row("muon: wall time for AdamW's final loss, median", statistics.median(needed) * ratio, "%"),
        ]
    )


if __name__ == "__main__":
    main()
