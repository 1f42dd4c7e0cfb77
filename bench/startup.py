"""Start-up: how long train.py takes to the end of its first step, beyond `import torch`.

python bench/startup.py        # a minute

A fresh process, a small model, prepared data; before the step it validates on one window, and saves nothing.
"""

import os
import subprocess
import sys
import tempfile

import harness

SETTINGS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 64,
    "block_size": 64,
    "batch_tokens": 512,
    "batch_size": 8,
    "eval_tokens": 64,
    "warmup_iters": 1,
    "log_interval": 1,
    "max_iters": 1000,
    "eval_interval": 1000,
    "device": "cpu",
}


def first_step(data, out):
    """Run train.py until it has said what step 1 was like, then stop it."""
    command = [sys.executable, os.path.join(harness.ROOT, "train.py"), f"--dataset={data}", f"--out_dir={out}"]
    command += [f"--{key}={value}" for key, value in SETTINGS.items()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        reached = any(line.startswith("step 1/") for line in process.stdout)
        process.kill()
    if not reached:
        sys.exit("train.py ended before its first step")


def main():
    """Measure, print and keep the row."""
    with tempfile.TemporaryDirectory() as place:
        data = os.path.join(place, "data")
        prepare = [sys.executable, os.path.join(harness.ROOT, "prepare.py"), os.path.join(harness.ROOT, "README.md")]
        subprocess.run([*prepare, "--tokenizer=bytes", "--out", data], check=True, stdout=subprocess.DEVNULL)
        runs = (os.path.join(place, str(i)) for i in range(100))
        works = {
            "train.py": lambda: first_step(data, next(runs)),
            "import torch": lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True),
        }
        times = harness.interleaved(works)
    beyond = times["train.py"] - times["import torch"]
    harness.report(
        [
            harness.row("import torch", times["import torch"], "s"),
            harness.row("train.py's first step, beyond import torch", beyond, "s", "<= 4"),
        ]
    )


if __name__ == "__main__":
    main()
