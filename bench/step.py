"""A training step on the CPU: time and memory against a plain step and transformers', and against the matrix
peak.

    python bench/step.py small                     # 6 blocks x 384, vocabulary 50304, T 256, batch 8
    python bench/step.py gpt2                      # GPT-2 124M, T 1024, micro-batch 2
    python bench/step.py small --against ../before # this tree's steps against those of another checkout

Each contender is a process of its own, which makes one step whenever it is told to, in turn with the others.
Ours is train.py's own `train_step` in a run that `train.py` has set up. Memory is the peak of that process
after two steps, less what it had after its imports. FLOPs are 6 per matmul parameter and 12 L C T for
attention. All compute in fp32; on a CPU with matrix units one more contender computes in bfloat16.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import harness
import numpy as np
from harness import row

SHAPES = {
    "small": {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 8},
    "gpt2": {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "batch_size": 2},
}
BARS = {
    "small": {"time": "<= 0.95", "transformers": "<= 0.95", "cheap": "<= 0.55", "peak": ">= 70"},
    "gpt2": {"time": "<= 0.95", "cheap": "<= 0.75", "full": "<= 0.6"},
}  # times and memory as shares of the plain step's; transformers: of its time
BFLOAT16 = "<= 0.5"  # of the plain step's time, on CPUs that multiply in bfloat16
OURS = ("none", "cheap", "full")  # checkpoint_activations
ROUNDS = 5


def make_data(folder, tokens=1_000_000, tokenizer="gpt2"):
    """A data folder of random ids."""
    for split in ("train", "val"):
        ids = np.random.default_rng(1).integers(0, 50257, tokens).astype("<u2")
        ids.tofile(os.path.join(folder, f"{split}.bin"))
    meta = {"tokenizer": {"name": tokenizer, "n_vocab": 50257, "eot": 50256}, "dtype": "uint16"}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f)


class Contender:
    """A process that makes steps of a model with these sizes on demand: `seconds("step")`, or "evaluate",
    returns how long one took; `memory` is then the peak so far in MB. env: further environment variables.
    `sizes` may hold more of train.py's settings; with a device among them, the plain step is nanoGPT's for
    GPUs, and memory is that device's."""

    def __init__(self, sizes, name, folder, root=harness.ROOT, env=None):
        arguments = [json.dumps(sizes), name, folder, root]
        command = [sys.executable, os.path.abspath(__file__), "--contender", *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=root, env=os.environ | (env or {}), **pipes)

    def seconds(self, what="step", times=1):
        self.start(what, times)
        return self.answer()

    def start(self, what="step", times=1):
        print(what, times, file=self.process.stdin, flush=True)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that makes steps ended with status {self.process.wait()}")
        answer = json.loads(line)
        self.memory, self.found = answer["memory"], answer["found"]
        return answer["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def contend(sizes, name, folder, root):
    """The other side of Contender: answer each line on stdin, until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    sys.path.insert(0, root)
    import torch._dynamo

    import model
    import train

    on_gpu, before = sizes.get("device") == "cuda", 0
    path, T = os.path.join(folder, "train.bin"), sizes["block_size"]

    def memory():
        return torch.cuda.max_memory_allocated() / 1e6 if on_gpu else harness.memory_mb() - before

    def repeat(work, times):
        for _ in range(times):
            found = work()
        if on_gpu:
            torch.cuda.synchronize()
        return found

    def serve(**works):
        """Do what each line on stdin names, so many times; answer with a line of JSON."""
        for line in sys.stdin:
            what, times = line.split()
            began = time.perf_counter()
            found = repeat(works[what], int(times))
            spent = (time.perf_counter() - began) / int(times)
            answer = {"seconds": spent, "memory": memory(), "found": found}
            print(json.dumps(answer), file=answers, flush=True)
        sys.exit()

    if name in ("plain", "transformers"):
        import baselines

        if name == "transformers":
            import transformers

            transformers.GPT2LMHeadModel  # noqa: B018 (imports it)
        before = harness.memory_mb("VmRSS")
        fields = {field.name for field in dataclasses.fields(model.GPTConfig)}
        config = model.GPTConfig(bias=False, **{k: v for k, v in sizes.items() if k in fields})
        if "device" in sizes:
            accumulation = sizes["batch_tokens"] // (sizes["batch_size"] * T)
            batch = path, sizes["batch_size"], accumulation
            serve(step=baselines.nanogpt_step(config, *batch, sizes["device"], sizes["compile"]))
        trainer = (baselines.plain if name == "plain" else baselines.hugging_face)(config)
        serve(step=lambda: trainer.step(*baselines.random_batch(path, sizes["batch_size"], T)))

    before = harness.memory_mb("VmRSS")
    train_step, tokens = train.train_step, sizes["batch_size"] * T

    def answer(run):
        serve(
            step=lambda: train_step(run),
            evaluate=lambda: train.validate(run),
            save=lambda: train.save_checkpoint(run),
            settle=lambda: train.wait_for_checkpoint(run),
            events=lambda: harness.events(lambda: train_step(run)),
        )

    train.train_step = answer
    settings = {"batch_tokens": tokens, "eval_tokens": tokens, "bias": False, "warmup_iters": 0}
    settings |= {"dataset": folder, "out_dir": os.path.join(folder, f"out-{os.getpid()}"), "device": "cpu"}
    settings |= {"learning_rate": 1e-3, "min_lr": 1e-3} | sizes
    if name != "default":
        settings["checkpoint_activations"] = name
    train.main([f"--{key}={value}" for key, value in settings.items()])


def measure(contenders, prepare=lambda: None):
    """({name: seconds (ROUNDS,)}, {name: MB}): two steps each for memory and to warm up, then in
    turn."""
    memory = {}
    for name, contender in contenders.items():
        contender.seconds()
        contender.seconds()  # the second finds the optimizer's state there
        memory[name] = contender.memory
    times = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        prepare()
        for name, contender in contenders.items():
            times[name].append(contender.seconds())
    return {name: np.array(t) for name, t in times.items()}, memory


def matrix_peak():
    """What torch.mm reaches on square matrices, in FLOP/s."""
    import torch

    a, b, out = (torch.randn(2048, 2048) for _ in range(3))
    times = [harness.seconds(lambda: torch.mm(a, b, out=out)) for _ in range(9)]
    return 2 * 2048**3 / statistics.median(times)


def against(shape, other, folder):
    """Print times and memory of this tree's steps as shares of another checkout's."""
    sizes = SHAPES[shape] | {"dtype": "float32"}
    contenders = {name: Contender(sizes, name, folder) for name in OURS}
    contenders["other"] = Contender(sizes, "default", folder, os.path.abspath(other))
    times, memory = measure(contenders)
    rows = []
    for name, bars in {"none": ("<= 1.03", ""), "cheap": ("", "<= 1.05"), "full": ("", "")}.items():
        rows += [
            row(f"step {shape}, {name}: time / other", times[name] / times["other"], "ratio", bars[0]),
            row(f"step {shape}, {name}: memory / other", memory[name] / memory["other"], "ratio", bars[1]),
        ]
    harness.show(rows)
    for contender in contenders.values():
        contender.close()


def main(shape, folder):
    """Measure and report one shape."""
    from inheritune.training.device import has_matrix_units
    from model import GPTConfig

    sizes, bars, gemm = SHAPES[shape], BARS[shape], []
    names = [*OURS, "plain", *(["transformers"] if shape == "small" else [])]
    contenders = {name: Contender(sizes | {"dtype": "float32"}, name, folder) for name in names}
    if shape == "small":
        contenders["muon"] = Contender(sizes | {"dtype": "float32", "optimizer": "muon"}, "none", folder)
    if has_matrix_units():
        contenders["bfloat16"] = Contender(sizes | {"dtype": "bfloat16"}, "none", folder)
    time, memory = measure(contenders, prepare=lambda: gemm.append(matrix_peak()))
    evaluation = np.array([contenders["none"].seconds("evaluate") for _ in range(ROUNDS)])
    for contender in contenders.values():
        contender.close()

    peak = np.array(gemm)
    config = GPTConfig(bias=False, **{k: v for k, v in sizes.items() if k != "batch_size"})
    share = 100 * config.flops_per_token * sizes["batch_size"] * config.block_size / peak
    rows = [row(f"step {shape}: time", time["none"], "s")]
    for name in OURS:
        bar = bars["time"] if name == "none" else ""
        rows.append(row(f"step {shape}, {name}: time / plain step", time[name] / time["plain"], "ratio", bar))
        rows.append(row(f"step {shape}, {name}: memory", memory[name], "MB"))
        share_of_memory = memory[name] / memory["plain"]
        rows.append(
            row(f"step {shape}, {name}: memory / plain step", share_of_memory, "ratio", bars.get(name, ""))
        )
    rows += [
        row(f"step {shape}: matrix peak", peak / 1e9, "GFLOP/s"),
        row(f"step {shape}: share of matrix peak", share / time["none"], "%", bars.get("peak", "")),
        row(f"step {shape}: the plain step's share", share / time["plain"], "%"),
    ]
    if "bfloat16" in contenders:
        faster = time["bfloat16"] / time["plain"]
        rows.append(row(f"step {shape}, bfloat16: time / plain step", faster, "ratio", BFLOAT16))
    if shape == "small":
        rows.append(row(f"step {shape}, Muon: time / AdamW's", time["muon"] / time["none"], "ratio"))
        rows.append(row("evaluation: tokens/s / training's", time["none"] / evaluation, "ratio", ">= 2.8"))
        theirs = time["none"] / time["transformers"]
        rows.append(row(f"step {shape}: time / transformers", theirs, "ratio", bars["transformers"]))
        rows.append(
            row(f"step {shape}: memory / transformers", memory["none"] / memory["transformers"], "ratio")
        )
    harness.report(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        contend(json.loads(sys.argv[2]), *sys.argv[3:])
    parser = argparse.ArgumentParser(description="A training step: time and memory.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--against", help="another checkout of this repository")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as data:
        make_data(data)
        against(args.shape, args.against, data) if args.against else main(args.shape, data)
