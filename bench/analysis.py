"""What analyze.py costs beyond the forward passes, at GPT-2 medium's size with random weights, 100 × 100 tokens.

python bench/analysis.py        # on an otherwise idle machine; a few minutes
"""

import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from analyze import look
from model import GPT, GPTConfig


def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.inference_mode()
def forward(model, idx):
    """All of `idx` through the blocks, a few windows at a time."""
    for part in idx.split(4):
        model.hidden(part)


def main(rounds=3):
    """Time both, interleaved; print medians."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=24, n_head=16, n_embd=1024, bias=False)).eval()
    idx = torch.randint(0, 50257, (100, 100))
    forward(model, idx[:4])
    times = [(seconds(lambda: forward(model, idx)), seconds(lambda: look(model, idx))) for _ in range(rounds)]
    plain, whole = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"forward passes {plain:.1f} s, analysis {whole:.1f} s: {whole - plain:.1f} s beyond them")


if __name__ == "__main__":
    main()
