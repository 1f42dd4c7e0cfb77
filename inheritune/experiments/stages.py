"""One run of train.py: its start, and what it leaves: curves, losses, wall time, a row of the table."""

import dataclasses
import os
import shlex
import sys
import threading
from collections.abc import Callable

import torch

from inheritune.base.errors import UserError
from inheritune.base.signals import StopRequest
from inheritune.data.reader import ValData, identity
from inheritune.data.tokenizer import tokenizer_files
from inheritune.experiments.arms import Common, Stage, find_arm, settings_hash
from inheritune.experiments.attention_metrics import LENGTH, SEED, SEQUENCES, draw_windows, max_rank
from inheritune.training import device as machine
from inheritune.training.distributed import DistributedModel, Ranks, seed_all
from inheritune.training.logs import read_rows
from inheritune.training.losses import mean_loss
from inheritune.training.settings import ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint
from inheritune.weights.initialisations import make_checkpoint
from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ALONE = threading.Lock()  # torch's generator and threads belong to the process: one measurement at a time


def train_command(stage: Stage) -> list[str]:
    """The command line of train.py that begins or continues a stage, under torchrun with several GPUs."""
    start = {"init_from": stage.start_folder} if stage.start else {}
    flags = stage.flags | start | {"out_dir": stage.run, "resume": "auto"}
    command = [sys.executable, os.path.join(ROOT, "train.py"), *stage.files]
    command += [f"--{key}={value}" for key, value in flags.items()]
    gpus = torch.cuda.device_count() if flags.get("device", "auto") in ("auto", "cuda") else 0
    if gpus > 1:  # needs a GPU
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        command[:0] = ["env", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"]  # time to save, where torch knows it
    return command


def run_stage(stage: Stage, request: StopRequest, quiet=False) -> None:
    """Make what a stage starts from, and train it to its end.

    quiet: train.py's output goes to RUN.txt beside the run. Raises UserError when it fails, and Stopped when
    `request` asks to end.
    """
    if stage.start and not os.path.exists(stage.start_folder):
        with ALONE:
            make_start(stage)
    command, why = train_command(stage), "see above"
    if quiet:
        os.makedirs(os.path.dirname(stage.run), exist_ok=True)
        with open(stage.run + ".txt", "a+", encoding="utf-8") as f:
            status = request.call(command, stdout=f, stderr=f)
            f.seek(0)
            lines = [line.strip() for line in f if line.strip()]
            said = [line for line in lines if line.startswith("train.py: ")]  # torchrun adds its own
            why = f"{(said or lines or ['no output'])[-1]}; see {stage.run}.txt"
    else:
        print(f"\n$ {shlex.join(command)}", flush=True)
        status = request.call(command)
    if status:
        raise UserError(f"training {stage.run} did not finish ({why}); run the same command again to go on")


def make_start(stage: Stage) -> None:
    """Make the checkpoint that a stage starts from."""
    how = dict(stage.start)
    source = checkpoint.find(how.pop("ckpt"))
    files = tokenizer_files(GPTConfig.from_folder(source), source)
    make_checkpoint(source, stage.start_folder, lambda config: GPT(GPTConfig(**config)), files, **how)


def curve(run: str) -> tuple[list[float], list[float]]:
    """(tokens, validation losses in nats/token) of a run folder's log.csv."""
    rows = [r for r in read_rows(os.path.join(run, "log.csv")) if r["val_loss"]]
    return [float(r["tokens"]) for r in rows], [float(r["val_loss"]) for r in rows]


def curve_of(stages: list[Stage]) -> tuple[list[float], list[float]]:
    """(FLOPs, validation losses) of an arm, its stages one after the other."""
    xs, ys, before = [], [], 0.0
    for stage in stages:
        tokens, losses = curve(stage.run)
        per_token = stage.flops_per_step / stage.flags["batch_tokens"]
        xs, ys = xs + [before + t * per_token for t in tokens], ys + losses
        before += stage.flops
    return xs, ys


def wall_seconds(run: str) -> float:
    """Seconds that a run trained and validated; its clocks begin again at 0 wherever it was continued."""
    rows = read_rows(os.path.join(run, "timing.csv"))
    seconds = [float(row["train_s"]) + float(row["val_s"]) for row in rows]
    last = [here for here, after in zip(seconds, [*seconds[1:], -1.0], strict=True) if after < here]
    return sum(last)  # of each process


def first_reach(stages: list[Stage], target: float) -> dict:
    """{reached_step, reached_flops, reached_layer_steps} up to the first validation at or below target,
    earlier stages counted; None where it never comes there."""
    keys = ("reached_step", "reached_flops", "reached_layer_steps")
    steps, flops, layer_steps = 0, 0.0, 0
    for stage in stages:
        n_layer = stage.config.n_layer
        for row in read_rows(os.path.join(stage.run, "log.csv")):
            if row["val_loss"] and float(row["val_loss"]) <= target:
                n = int(row["step"])
                reached = steps + n, flops + n * stage.flops_per_step, layer_steps + n * n_layer
                return dict(zip(keys, reached, strict=True))
        steps, flops, layer_steps = steps + stage.steps, flops + stage.flops, layer_steps + stage.layer_steps
    return dict.fromkeys(keys)


def measure(settings: TrainSettings, config: GPTConfig, folder: str) -> float:
    """Validation loss (nats/token) of a checkpoint as train.py measures it: the same tokens in the same
    windows, compiled or not, in the same number format. Nothing stays on the device."""
    device, ranks = machine.pick(settings.device), Ranks()
    torch.set_float32_matmul_precision("high")
    val = ValData(settings.dataset, config.block_size, settings.eval_tokens, settings.batch_size)
    dtype, module = machine.pick_dtype(settings.dtype, device), GPT.from_pretrained(folder)
    model = DistributedModel(module, ranks, device, dtype, settings.compile, shard=False)
    loss = mean_loss(model.validated, val, ranks, device, dtype)
    del model, module
    release(device)
    return loss


def max_ranks(settings: TrainSettings, load: Callable[[], GPT]) -> list[float]:
    """MaxRank of each layer of the model that `load` makes, on the paper's 100 windows of val, the same for
    every arm and seed. Nothing stays on the device."""
    device = machine.pick(settings.device)
    model = load().to(device)
    length = min(LENGTH, model.config.block_size)
    ranks = max_rank(model, draw_windows(settings.dataset, "val", SEQUENCES, length, SEED)[0]).tolist()
    del model
    release(device)
    return ranks


def release(device: torch.device) -> None:
    """Give the memory of deleted models back: the training that comes next is another process."""
    if device.type == "cuda":  # needs a GPU
        torch.cuda.empty_cache()


def make_row(settings: TrainSettings, rep: ReplicateSettings, c: Common, arm: str, seed: int, target) -> dict:
    """What row.json says of a trained arm: results.csv's columns, and MaxRank by depth before and after.

    target: the reference's last loss on its curve, None for the reference itself.
    """
    stages = find_arm(arm).stages(c, arm)
    with ALONE:
        own, config, before, after = trained_row(settings, rep, c, stages)
    # with the reference's own training
    pipeline = {"flops": own["flops"], "layer_steps": own["layer_steps"]}
    if find_arm(arm).source:
        theirs = {"flops": c.reference_flops, "layer_steps": c.reference_layer_steps}
        pipeline = {key: None if theirs[key] is None else pipeline[key] + theirs[key] for key in pipeline}
    return {
        "arm": arm,
        "seed": seed,
        **own,
        "params": config.num_params,
        "settings_hash": settings_hash(c, arm),
        "data": identity(settings.dataset),
        "n_layer": config.n_layer,
        "flops_with_reference": pipeline["flops"],
        "layer_steps_with_reference": pipeline["layer_steps"],
        **first_reach(stages, own["curve_loss"] if target is None else target),
        "lazy_before": None if before is None else sum(r == 1 for r in before),
        "lazy_after": sum(r == 1 for r in after),
        "ranks_before": before,
        "ranks_after": after,
        "hardware": checkpoint.environment()["hardware"] | {"threads": torch.get_num_threads()},
    }


def trained_row(settings, rep, c, stages):
    """(losses and costs of an arm's stages, GPTConfig of its model, its MaxRanks before and after); of no
    stages: of the reference that was given, before whose training nothing is known."""
    last = stages[-1] if stages else None
    folder = checkpoint.find(last.run, prefer="latest") if last else c.reference
    config = GPTConfig.from_folder(folder) if last else c.config

    def begin():
        if last.start:
            return GPT.from_pretrained(last.start_folder)
        seed_all(c.flags["seed"])  # as train.py does before it makes the same model
        return GPT(config)

    at_length = dataclasses.replace(settings, eval_tokens=rep.final_tokens or settings.eval_tokens)
    curve_loss = curve(last.run)[1][-1] if last else measure(settings, config, folder)
    own = {
        "val_loss": measure(at_length, config, folder) if rep.final_tokens else curve_loss,
        "curve_loss": curve_loss,
        "steps": sum(s.steps for s in stages) if last else None,
        "flops": sum(s.flops for s in stages) if last else c.reference_flops,
        "layer_steps": sum(s.layer_steps for s in stages) if last else c.reference_layer_steps,
        "wall_s": round(sum(wall_seconds(s.run) for s in stages), 1) if last else None,
    }
    before = max_ranks(settings, begin) if last else None
    return own, config, before, max_ranks(settings, lambda: GPT.from_pretrained(folder))
