"""What only a GPU can show, in half an hour on one card: numbers, graphs, speed and memory.

    make gpu                          # make gpu PYTHON=python3: with a torch that is installed already
    python bench/gpu.py losses xl     # these steps alone; the rows of the others stay
    python bench/gpu.py --toy OUT     # every step at toy size on the CPU, with its results in OUT

Each step is a process with a time limit; when it ends, its rows are in results/gpu.md and gpu.csv. Nothing is
fetched: the data are this repository's own text, as bytes, and random ids.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile

import gpu_harness  # first: it finds the other files
import torch
from gpu_harness import Place, dry_run, measured, random_model, train, waits
from harness import ROOT, events, read, report, row, seconds

import train as train_script
from inheritune.training.device import peak_flops, pick, pick_dtype
from model import GPT, GPTConfig

PEAK = "matrix product, 8192 x 8192 x 8192, bf16"


def peak(p):
    """The card's matrix products, which training is measured by."""
    device, n = pick(p.device), 256 if p.toy else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products():
        for _ in range(5):
            c = a @ b
        return c[0, 0].item()  # waits for all

    rate = 10 * n**3 / statistics.median(seconds(products) for _ in range(9))
    yield row(PEAK, rate / 1e12, "TFLOP/s")
    if sheet := peak_flops(device):
        yield row("of the data sheet's", 100 * rate / sheet, "%", ">= 50")


def losses(p):
    """The same training on the CPU and on the GPU."""
    cases = {"float32": {}, "muon": {"optimizer": "muon"}, "distillation": {"teacher": p.path("float32-cpu")}}
    on_cpu = {n: train(p, f"{n}-cpu", **case, dtype="float32", device="cpu")[0] for n, case in cases.items()}
    yield row("learned", on_cpu["float32"][0] - on_cpu["float32"][-1], "nats", ">= 0.1")
    for name in [*cases, "bfloat16", "float16"]:
        settings = {"dtype": "float32"} | cases[name] if name in cases else {"dtype": name}
        here, there = train(p, name, **settings)[0], on_cpu.get(name, on_cpu["float32"])
        first, last = ("<= 0.001", "<= 0.02") if name in on_cpu else ("<= 0.005", "<= 0.05")
        yield row(f"{name}: off the CPU's at first", abs(here[0] - there[0]), "nats", first)
        yield row(f"{name}: off the CPU's at last", abs(here[-1] - there[-1]), "nats", last)


def graphs(p):
    """The compiled graphs of trainings with validations; DDP and FSDP2, over NCCL, in a world of one."""
    T = p.sizes("gpt2")["block_size"]
    settings = p.sizes("gpt2") | {"dataset": p.path("ids"), "batch_tokens": 16 * T, "eval_tokens": 18 * T}
    settings |= {"scale_attn_by_inverse_layer_idx": True, "compile": True}
    settings |= {"max_iters": 30, "eval_interval": 15}
    sharded = 3 * (settings["n_layer"] + 1)  # blocks (of scales of their own), loss; step, two validations
    kinds = {"one process": ("counted", 4), "DDP": ("alone", 30), "FSDP2": ("alone", sharded)}
    for kind, (patch, most) in kinds.items():
        curve, timing, counts = train(p, f"graphs-{kind}", patch, shard=kind == "FSDP2", **settings)
        for key, count in counts.items():
            yield row(f"{kind}: {key}", count, "", f"<= {most if key == 'graphs' else 0}")
        if kind == "one process":
            one, its = curve, timing
        yield row(f"{kind}: loss off one process's", abs(curve[-1] - one[-1]), "nats", "<= 0.02")
        for key, bar in {"tokens_per_s": ">= 0.9", "memory_mb": "<= 1.1"}.items():
            yield row(f"{kind}: {key} / one process's", timing[key] / its[key], "ratio", p.speed(bar))


def training(p, shape):
    """train.py's step against nanoGPT's, the card and --dry_run."""
    sizes, T = p.sizes(shape), p.sizes(shape)["block_size"]
    settings = sizes | {"device": p.device, "compile": not p.toy or shape == "gpt2"}
    for micro in (8, 4, 2, 1):
        settings |= {"batch_size": micro, "batch_tokens": 4 * micro * T, "eval_tokens": micro * T}
        if (estimate := dry_run(p, **settings)) < 0.85 * p.memory:
            break
    ours = measured(p, **settings, save=shape == "gpt2")
    config = GPTConfig(**sizes, bias=False)
    share = 100 * config.flops_per_token * settings["batch_tokens"] / ours["step"] / p.peak
    yield row(f"step of 4 micro-batches of {micro}", 1000 * ours["step"], "ms")
    yield row("tokens a second", settings["batch_tokens"] / ours["step"], "")
    yield row("share of the matrix product's speed", share, "%", p.speed(f">= {45 if shape == 'xl' else 50}"))
    yield row("memory", ours["memory"], "GB")
    yield row("memory / --dry_run's", ours["memory"] / estimate, "ratio", p.speed("<= 1.05"))
    yield row("seconds to the end of the first step", ours["first"], "s")
    yield row("copies from unpinned memory, a step", ours["pageable"], "", "<= 0")
    yield row("waits for the GPU, a step", ours["waits"], "", "<= 4")
    if shape == "gpt2":
        yield row("copy for a checkpoint", 12e-9 * config.num_params / ours["save"], "GB/s", p.speed(">= 8"))
    plain = measured(p, "plain", **settings)
    yield row("step / nanoGPT's", ours["step"] / plain["step"], "ratio", p.speed("<= 1.02"))
    yield row("memory / nanoGPT's", ours["memory"] / plain["memory"], "ratio", p.speed("<= 1.02"))


def variants(p):
    """GPT-2 with more to compute or less to keep, against the plain training."""
    settings = p.sizes("gpt2") | {"device": p.device, "compile": not p.toy, "batch_size": 8}
    settings |= {"batch_tokens": 16 * settings["block_size"], "eval_tokens": settings["block_size"]}
    plain = measured(p, **settings)["step"]
    cases = {kind: ({"checkpoint_activations": kind}, 1.45) for kind in ("cheap", "full")}
    cases |= {"muon": ({"optimizer": "muon"}, 1.3), "teacher": ({"teacher": random_model(p, "gpt2")}, 1.7)}
    for name, (change, slower) in cases.items():
        estimate, found = dry_run(p, **settings, **change), measured(p, **settings, **change)
        yield row(f"{name}: step / plain", found["step"] / plain, "ratio", p.speed(f"<= {slower}"))
        yield row(f"{name}: memory", found["memory"], "GB")
        yield row(f"{name}: memory / --dry_run's", found["memory"] / estimate, "ratio", p.speed("<= 1.05"))


def sampling(p):
    """GPT-2's tokens, one row at a time and sixteen."""
    device, speed = pick(p.device), {}
    model = GPT.from_pretrained(random_model(p, "gpt2")).eval().to(device, pick_dtype("auto", device))
    model.config = dataclasses.replace(model.config, eot=-1)  # rows do not end

    def draw(rows, tokens=48):
        idx = torch.zeros(rows, 8, dtype=torch.long, device=device)
        return list(model.generate(idx, tokens, top_k=50))

    for rows in (1, 16):
        draw(rows, 4)  # what is timed reaches lengths that nothing has warmed up on
        speed[rows] = 48 * rows / seconds(lambda rows=rows: draw(rows))
        waited = waits(events(lambda rows=rows: draw(rows, 16))) / 16
        yield row(f"batch {rows}: tokens a second", speed[rows], "")
        yield row(f"batch {rows}: waits for the GPU, a token", waited, "", "<= 1.2")
    yield row("batch 16 / batch 1", speed[16] / speed[1], "ratio", p.speed(">= 8"))


# seconds at most; in this order fifteen minutes on a card tell the most
STEPS = dict(peak=60, gpt2=180, graphs=300, variants=300, losses=300, sampling=60, xl=420, large=300)


class One(int):
    """A number of ranks that is 1, and yet more than one."""

    __eq__, __gt__, __hash__ = (lambda *_: False), (lambda *_: True), int.__hash__


def train_and_count(kind, argv):
    """train.py, whose last line is JSON: compiled graphs, those after the first step, symbols, graph breaks.
    kind "alone": as a rank of DDP or FSDP2 without others."""
    symbols, after, compile, step = [], {}, torch.compile, train_script.train_step
    if kind == "alone":
        os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_PORT"), "0")
        os.environ |= {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        train_script.rank_info = lambda: (0, One(1), 0)

    def backend(graph, inputs):
        values = [*inputs, *(node.meta.get("example_value") for node in graph.graph.nodes)]
        symbols.append(sum(isinstance(value, torch.SymInt) for value in values))
        return torch._inductor.compile(graph, inputs)

    def step_and_count(run):
        step(run)
        after.setdefault("first", len(symbols))

    torch.compile = lambda module=None, **options: compile(module, backend=backend, **options)
    train_script.train_step = step_and_count
    train_script.main(argv)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    found = {"graphs": len(symbols), "graphs after the first step": len(symbols) - after["first"]}
    print(json.dumps(found | {"symbols": sum(symbols), "graph breaks": breaks}))


def answer(name, place):
    """Print the rows of a step, and nothing else, to standard output."""
    rows, p = os.fdopen(os.dup(1), "w"), Place(**place)
    os.dup2(2, 1)
    for found in training(p, name) if name in gpu_harness.SHAPES else globals()[name](p):
        print(json.dumps(found), file=rows, flush=True)


def main():
    """Run the steps in order."""
    parser = argparse.ArgumentParser(description="Measure what only a GPU can show.")
    parser.add_argument("steps", nargs="*", help="default: all, in their order")
    parser.add_argument("--toy", metavar="OUT", help="on the CPU; the results go into this folder")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no step {', '.join(unknown)}: there are {', '.join(STEPS)}")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if args.toy else {}
    facts, memory = gpu_harness.machine()
    if not (memory or args.toy):
        sys.exit(f"gpu.py: torch {facts['torch']} sees no CUDA GPU: nothing to measure here")
    out, missed = args.toy or os.path.join(ROOT, "results"), []
    table = os.path.join(out, "gpu.csv")
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        p = Place(folder, "cpu" if args.toy else "cuda", memory or math.inf)
        gpu_harness.make_data(p)
        for name in args.steps or STEPS:
            print(f"\n{name}", flush=True)
            own = [r for r in read(table) if PEAK in r["name"] and r["card"] == facts["card"]]
            p.peak = 1e12 * float(own[0]["value"]) if own else math.nan
            rows = gpu_harness.run_step(__file__, name, p, 600 if p.toy else STEPS[name])
            report([r | facts for r in rows], table)
            missed = gpu_harness.write_report(os.path.join(out, "gpu.md"), read(table), facts)
    sys.exit(f"gpu.py: {len(missed)} rows are not as they should be: {out}/gpu.md" if missed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_and_count(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["--step"]:
        answer(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
