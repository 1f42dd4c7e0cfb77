"""inherit.py on a model of GPT-2 XL's shape: 24 of its 48 blocks, against `cp` and `sync` of as many bytes.

python bench/inheriting.py        # two minutes, and 13 GB in a temporary folder (--place), which is deleted

The whole process is timed, with its imports. What is read is in the page cache for both, as far as memory
reaches; what is written must be on the disk.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time

import harness
import torch

import inherit
from inheritune.base.files import write_json
from inheritune.weights import gpt2_format
from inheritune.weights.tensors import LazyTensor, write_tensors
from model import GPTConfig


def make_source(folder):
    """A checkpoint of 6.2 GB: the same 16 million random numbers over and over, which no file system
    knows."""
    shape = GPTConfig(
        vocab_size=50257, n_layer=48, n_head=25, n_embd=1600, tokenizer=""
    )  # "": nothing to fetch
    config = dataclasses.asdict(shape)
    noise = torch.randn(2**24)

    def repeated(shape):
        row = math.prod(shape[1:])
        return LazyTensor(shape, noise.dtype, lambda a, b: noise[: (b - a) * row].view(b - a, *shape[1:]))

    os.mkdir(folder)
    write_json(os.path.join(folder, "config.json"), gpt2_format.config_json(config))
    path = os.path.join(folder, "model.safetensors")
    write_tensors(path, {name: repeated(shape) for name, shape in gpt2_format.shapes(config).items()})


def measure_memory(arguments):
    """Print by how much inherit.py raises the peak of this process's memory above that after its imports, in
    MB."""
    before = harness.memory_mb()
    inherit.main(arguments)
    print(json.dumps(harness.memory_mb() - before))


def compare(place):
    """The rows: seconds of both, their ratio, and memory."""
    source, small, copied = (os.path.join(place, name) for name in ("source", "small", "copied"))
    make_source(source)
    arguments = ["--ckpt", source, "--layers=24", "--out", small]
    script = [sys.executable, os.path.join(harness.ROOT, "inherit.py"), *arguments]
    memory = harness.in_own_process("inheriting.py", "--memory", *arguments)
    plain = os.path.join(place, "plain")
    shutil.move(small, plain)

    def copy():
        subprocess.run(["cp", "-r", plain, copied], check=True)
        subprocess.run(["sync"], check=True)

    def clear(_):
        for folder in (small, copied):
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["sync"], check=True)
        # A virtual machine gives freed memory back to its host within two seconds, and writing into memory
        # that must be fetched again takes twice as long. Both begin after that: starting Python takes one.
        time.sleep(3)

    works = {"inherit": lambda: subprocess.run(script, check=True, stdout=subprocess.DEVNULL), "copy": copy}
    times = harness.interleaved(works, prepare=clear)
    return [
        harness.row(
            "inherit.py, XL to 24 blocks: time / (cp + sync)", times["inherit"] / times["copy"], "", "<= 3"
        ),
        harness.row("inherit.py, XL to 24 blocks", times["inherit"], "s"),
        harness.row("cp + sync of the same bytes", times["copy"], "s"),
        harness.row("inherit.py, XL to 24 blocks: peak RSS above imports", memory, "MB", "<= 150"),
    ]


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--place", default=tempfile.gettempdir(), help="a folder on a real disk with 13 GB free"
    )
    parser.add_argument("--memory", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        measure_memory(args.memory)
        return
    with tempfile.TemporaryDirectory(dir=args.place) as place:
        rows = compare(place)
    harness.report(rows)


if __name__ == "__main__":
    main()
