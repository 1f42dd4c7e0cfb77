"""What the steps of bench/gpu.py share: trainings, measured steps, time limits, data, and the report."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np
import step
from harness import ROOT, read, row

import model
from inheritune.weights import gpt2_format

SHAPES = {"gpt2": (12, 12, 768), "large": (36, 20, 1280), "xl": (48, 25, 1600)}  # layers, heads, width
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 8, "batch_tokens": 4096}
SMALL |= {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 10, "max_iters": 40, "eval_interval": 20}
SMALL |= {"eval_tokens": 18 * 256, "log_interval": 5}  # the last group of validation windows is not full
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "batch_tokens": 256}
TINY |= {"eval_tokens": 18 * 32, "threads": 1}


@dataclasses.dataclass
class Place:
    """Where steps run. The folder holds the data folders `bytes` and `ids`, and what the steps make."""

    folder: str
    device: str
    memory: float  # GB of the card
    peak: float = math.nan  # FLOP/s of a matrix product, once measured

    @property
    def toy(self):
        return self.device == "cpu"

    def speed(self, bar):
        """A bar for speed or memory: none for toys."""
        return "" if self.toy else bar

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def sizes(self, shape):
        layers, heads, width = (2, 2, 32) if self.toy else SHAPES[shape]
        T = 16 if self.toy else 1024
        return {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": T}


def command(*argv):
    """Run a Python script; its output. When it fails, raises RuntimeError with the last line that it said."""
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"{argv[0]} failed").splitlines()[-1])
    return done.stdout


def flags(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def train(p, out, counted="", **changes):
    """Train the small model on bytes, into `out`; (validation losses, the last line of timing.csv, and with
    `counted` what train_and_count says)."""
    settings = SMALL | (TINY if p.toy else {}) | {"dataset": p.path("bytes"), "device": p.device} | changes
    script = ["bench/gpu.py", "--train", counted] if counted else ["train.py"]
    said = command(*script, *flags(**settings | {"out_dir": p.path(out)})).strip().splitlines()[-1]
    timing = {k: float(v) for k, v in read(p.path(out, "timing.csv"))[-1].items() if v}
    losses = [float(r["val_loss"]) for r in read(p.path(out, "log.csv")) if r["val_loss"]]
    return losses, timing, json.loads(said) if counted else None


def random_model(p, shape):
    """A checkpoint folder with random weights, for the ids."""
    folder = p.path(f"{shape}-random")
    if not os.path.exists(folder):
        config = model.GPTConfig(**p.sizes(shape), vocab_size=50304, bias=False, tokenizer="r50k_base")
        os.mkdir(folder)
        state = config.arrange(dict(model.GPT(config).named_parameters()))
        gpt2_format.write_model(folder, state, config.content(), {})
    return folder


def dry_run(p, **settings):
    """GB of training, as `train.py --dry_run` estimates them."""
    said = command("train.py", "--dry_run", f"--dataset={p.path('ids')}", *flags(**settings))
    return float(re.search(r"about ([\d.]+) GB on one GPU", said)[1]) or 0.01  # toys


def measured(p, kind="default", save=False, **settings):
    """What a training, or nanoGPT's ("plain"), takes: seconds to the end of the `first` step, of a later
    `step`, to copy for a checkpoint (`save`); `memory` in GB; `waits` for the GPU, and copies to it from
    memory that is not pinned (`pageable`)."""
    began = time.perf_counter()
    contender = step.Contender(settings, kind, p.path("ids"))
    contender.seconds()
    found = {"first": time.perf_counter() - began}
    contender.seconds("step", 2)
    found["step"] = statistics.median(contender.seconds("step", 4) for _ in range(5))
    found["memory"] = contender.memory / 1e3
    if kind != "plain":
        contender.seconds("events")
        found["waits"] = waits(contender.found)
        found["pageable"] = sum(n for event, n in contender.found.items() if "Pageable -> Device" in event)
    for _ in range(2 if save else 0):  # the first makes room for the copy
        found["save"] = contender.seconds("save")
        contender.seconds("settle")
        contender.seconds()
    contender.close()
    return found


def waits(events):
    return sum(events.get(f"cuda{what}Synchronize", 0) for what in ("Stream", "Event"))


def run_step(script, name, p, limit):
    """The rows of a step, made by `script --step NAME PLACE` in at most `limit` seconds; the last row says
    how long it took, or why it failed."""
    began, output = time.perf_counter(), p.path(f"{name}.txt")
    # SIGTERM to all its processes, as torchrun can end its ranks then, and SIGKILL if that does not help
    argv = ["timeout", "--kill-after=10", f"{limit:.0f}", sys.executable, script]
    argv += ["--step", name, json.dumps(dataclasses.asdict(p))]
    with open(output, "w") as f, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=f, text=True) as child:
        try:
            printed, _ = child.communicate()
        finally:  # after Ctrl-C no step stays on the GPU: `timeout` passes the signal on
            child.terminate()
    spent = time.perf_counter() - began
    rows = [json.loads(line) for line in printed.splitlines()]
    rows.append(row("the step took", spent, "s"))
    if child.returncode:
        with open(output) as f:
            said = (f.read().strip() or f"status {child.returncode}").splitlines()[-40:]
        print(*said, sep="\n", file=sys.stderr)
        why = f"not done after {limit:.0f} s" if spent > limit else said[-1].replace("|", "/")
        rows[-1]["verdict"] = f"failed: {why}"
    return [r | {"name": f"{name}: {r['name']}"} for r in rows]


def machine():
    """({card, torch, commit}, the card's memory in GB: 0 without one)."""
    code = "import torch; c = torch.cuda; p = c.is_available() and c.get_device_properties(0); "
    code += "print(torch.__version__, p and p.name or 'none', p and p.total_memory or 0, sep='|')"
    version, card, memory = command("-c", code).strip().split("|")  # a CUDA context of our own takes memory
    argv = [shutil.which("git") or "false", "describe", "--always", "--dirty"]  # without git: ""
    commit = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"card": card, "torch": version, "commit": commit}, int(memory) / 1e9


def make_data(p):
    """Data folders: `ids`, random, of a tokenizer that nobody opens; `bytes`, this repository's Python."""
    for name in ("ids", "bytes"):
        os.mkdir(p.path(name))
        step.make_data(p.path(name), 500_000 if p.toy else 20_000_000, "r50k_base")
    paths = sorted(f for part in ("inheritune", "tests") for f in pathlib.Path(ROOT, part).glob("**/*.py"))
    ids = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8).astype("<u2")
    ids[len(ids) // 50 :].tofile(p.path("bytes", "train.bin"))
    ids[: len(ids) // 50].tofile(p.path("bytes", "val.bin"))
    with open(p.path("bytes", "meta.json"), "w") as f:
        json.dump({"tokenizer": {"name": "bytes", "n_vocab": 257, "eot": 256}, "dtype": "uint16"}, f)


def write_report(path, rows, facts):
    """gpu.md: the rows of this card, torch and commit. Returns those that are not as they should be."""
    rows = [r for r in rows if all(r[key] == value for key, value in facts.items())]
    missed = [r for r in rows if r["verdict"] not in ("", "reached")]
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    lines = [f"# One GPU: {facts['card']}", ""]
    lines += [f"`make gpu`, {rows[-1]['date']}: {about}; {rows[0]['cpu']}.", ""]
    lines += [f"{len(missed)} of {len(rows)} rows are not as they should be.", ""]
    lines += ["| measured | value | bar | |", "|---|--:|--:|---|"]
    lines += [f"| {r['name']} | {r['value']} {r['unit']} | {r['bar']} | {r['verdict']} |" for r in rows]
    pathlib.Path(path).write_text("\n".join(lines) + "\n")
    return missed
