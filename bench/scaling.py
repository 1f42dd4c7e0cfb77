"""Step time and cost of the four GPT-2 sizes on 1 to 1,024 GPUs, on paper, and a check of the arithmetic with gloo.

python bench/scaling.py [--markdown results/scaling.md]        # half a minute

Nothing in the table was measured on a GPU. What is checked here is that a step of two processes takes the time of one
process's step plus that of an all-reduce of its gradients, with both measured apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import harness
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from inheritune.training.optimizer import make_optimizer
from inheritune.training.settings import TrainSettings
from model import GPT, GPTConfig

SIZES = {"124M": (12, 768), "medium": (24, 1024), "large": (36, 1280), "XL": (48, 1600)}  # blocks, channels
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
T, V = 1024, 50304
NODE = 8
PEAK, MFU = 989e12, 0.40  # FLOP/s of an H100 in bf16, and the share of it that a step reaches alone
NVLINK, NETWORK = 300e9, 40e9  # bytes/s that a GPU moves inside a node, and through its own 400 Gb/s card
LATENCY = 20e-6  # seconds of each of the ring's hops
DOLLARS = 2.5  # for an hour of a GPU
ASSUMED = (
    f"Assumed: {PEAK / 1e12:.0f} TFLOP/s at {MFU:.0%}; ring all-reduce of fp32 gradients, {NVLINK / 1e9:.0f} GB/s "
    f"a GPU in a node of {NODE}, {NETWORK / 1e9:.0f} GB/s between nodes, {LATENCY * 1e6:.0f} us a hop; the backward "
    f"pass (2/3 of the compute) hides all of it but a tenth; max(512, GPUs) sequences of {T} a step; ${DOLLARS} per "
    "GPU-hour; memory is weights, gradients and moments (16 bytes a parameter), no activations."
)


def estimate(size, gpus):
    """(seconds of a step, tokens of it, GB of state with DDP, with FSDP) on so many GPUs."""
    L, C = SIZES[size]
    params = L * (12 * C * C + 13 * C) + (V + T + 2) * C
    tokens = max(512, gpus) * T
    compute = tokens * (6 * (12 * L * C * C + V * C) + 12 * L * C * T) / (gpus * PEAK * MFU)
    inside, nodes = min(gpus, NODE), -(-gpus // NODE)
    traffic = 2 * 4 * params * ((inside - 1) / inside / NVLINK + (nodes - 1) / nodes / inside / NETWORK)
    traffic += 2 * (inside + nodes - 2) * LATENCY
    exposed = max(traffic / 10, traffic - compute * 2 / 3)
    return compute + exposed, tokens, params * 16 / 1e9, params * 16 / gpus / 1e9


def table():
    """The lines of the Markdown table."""
    yield "| model | GPUs | s/step | tokens/s | efficiency | $ per 1B tokens | GB, DDP | GB, FSDP |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for size in SIZES:
        alone = estimate(size, 1)
        for gpus in GPUS:
            step, tokens, ddp, fsdp = estimate(size, gpus)
            speed = tokens / step
            share = speed / gpus / (alone[1] / alone[0])
            cost = 1e9 / speed / 3600 * gpus * DOLLARS
            yield f"| {size} | {gpus} | {step:.3f} | {speed:,.0f} | {share:.0%} | {cost:.2f} | {ddp:.1f} | {fsdp:.1f} |"


def worker():
    """One of one or two processes: print (rank 0) the median seconds of a step and of its gradients' all-reduce."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = GPT(GPTConfig(block_size=128, vocab_size=8192, n_vocab=8192, n_layer=4, n_head=4, n_embd=256))
    forward = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = make_optimizer(model, TrainSettings(), torch.device("cpu"))
    x, y = torch.randint(8192, (2, 4, 128)).unbind(0)
    gradients = torch.zeros(model.num_params())

    def step():
        forward(x, y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = {"step": [], "reduce": []}
    for _ in range(12):
        dist.barrier()
        times["step"].append(harness.seconds(step))
        dist.barrier()
        times["reduce"].append(harness.seconds(lambda: dist.all_reduce(gradients)))
    if dist.get_rank() == 0:
        print(json.dumps([statistics.median(t[2:]) for t in times.values()]))
    dist.destroy_process_group()


def measure(processes):
    """[step, all-reduce] in seconds on so many processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [os.path.abspath(__file__), "--worker"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", help="write the table into this file, too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    text = "\n".join(["# Scaling, on paper", "", ASSUMED, "", *table()]) + "\n"
    print(text)
    if args.markdown:
        with open(args.markdown, "w") as f:
            f.write(text)
    alone, (both, reduce) = measure(1)[0], measure(2)
    harness.report(
        [
            harness.row("gloo, 1 process: step", alone * 1e3, "ms"),
            harness.row("gloo, 2 processes: all-reduce of the gradients alone", reduce * 1e3, "ms"),
            harness.row("gloo, 2 processes: step", both * 1e3, "ms"),
            harness.row("gloo, 2 processes: predicted step / measured", (alone + reduce) / both, ""),
        ]
    )


if __name__ == "__main__":
    main()
