"""Grow: the Inheritune recipe from beginning to end (paper, Algorithm 1), next to fair controls.

    python grow.py config/demo.py

Takes a trained reference (or trains one), inherits its first blocks, trains them, and while the small model is worse
than the reference on the same validation tokens, grows it and trains again. Each stage is a run of train.py in a
folder of its own under out_dir; all of them continue where they were, so an interrupted recipe is just run again.
"""

import dataclasses
import os
import shlex
import sys
from dataclasses import dataclass

import torch

import inherit
from inheritune.base.errors import UserError, one_line, raise_all
from inheritune.base.files import read_json
from inheritune.base.signals import Request
from inheritune.data.reader import ValData
from inheritune.experiments.report import write_report
from inheritune.training import device as machine
from inheritune.training import planning
from inheritune.training.distributed import Ranks
from inheritune.training.logs import read_rows
from inheritune.training.losses import mean_loss
from inheritune.training.parsing import parse
from inheritune.training.settings import GrowSettings, ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint
from model import GPT, GPTConfig

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = ("dataset", "eval_tokens", "seed", "device", "dtype", "compile", "threads")  # the reference's are the same


@dataclass
class Arm:
    """One trained model of the recipe, as results.json has it; None where nobody can know."""

    arm: str  # reference, inheritune, random, random_matched
    n_layer: int
    params: int
    tokens: int | None  # that it was trained on
    flops: float | None  # of its own training
    val_loss: float  # nats/token, after the last step
    folder: str  # run folder or checkpoint, relative to out_dir where it lies inside


def flags_of(settings):
    """{key: value} as command-line flags."""
    return [f"--{key}={value}" for key, value in settings.items()]


def train_command(flags, out_dir, config=()):
    """The command line (a list) of train.py on `config` (at most one file) with these flags ({key: value}) that begins
    or continues the run in out_dir, under torchrun where there are several GPUs."""
    command = [sys.executable, os.path.join(HERE, "train.py"), *config]
    command += flags_of(flags | {"out_dir": out_dir, "resume": "auto"})
    gpus = torch.cuda.device_count() if flags.get("device", "auto") in ("auto", "cuda") else 0
    if gpus > 1:  # needs a GPU
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    return command


def run_train(flags, out_dir, config=()):
    """Run `train_command` and wait for it. Raises UserError when it fails."""
    command = train_command(flags, out_dir, config)
    print(f"\n$ {shlex.join(command)}", flush=True)
    with Request() as request:
        status = request.call(command)
    if status:
        raise UserError(f"training {out_dir} did not finish (see above); run the same command again to go on")


def reference_name(settings, grow):
    """Where the reference is, or will be."""
    return grow.reference or os.path.join(settings.out_dir, "reference")


def find_reference(settings, given, grow):
    """The reference's checkpoint folder. With reference_config it is trained first, or to its end, on the recipe's
    data with the recipe's seed. Raises UserError when there is nothing to take or to train."""
    name = reference_name(settings, grow)
    if grow.reference_config:
        shared = {key: getattr(settings, key) for key in SHARED if key in given}
        run_train(shared, name, [grow.reference_config])
    return checkpoint.find(name, prefer="latest")


def small_flags(settings, given):
    """The flags of every small model: what was set for the recipe, without what each stage decides."""
    decided = {"out_dir", "init_from", "inherit_layers", "resume", "dry_run", "n_layer"}
    return {key: getattr(settings, key) for key in dataclasses.asdict(settings) if key in given and key not in decided}


def final_loss(run):
    """The validation loss (nats/token) after the last step of a finished run folder."""
    return float(read_rows(os.path.join(run, "log.csv"))[-1]["val_loss"])


def measure(settings, config, folder):
    """Validation loss of a checkpoint on exactly the tokens, cut in the same windows, that the small models get."""
    device = machine.pick(settings.device)
    val = ValData(settings.dataset, config.block_size, settings.eval_tokens, settings.batch_size)
    model = GPT.from_pretrained(folder).to(device)
    loss = mean_loss(model, val, Ranks(), device, machine.pick_dtype(settings.dtype, device))
    del model
    if device.type == "cuda":  # needs a GPU
        torch.cuda.empty_cache()  # the training that comes next is another process
    return loss


def arm_of(name, run, settings):
    """The Arm of a finished run folder or a lone checkpoint; a checkpoint without state.json has unknown compute."""
    folder = checkpoint.find(run, prefer="latest")
    config = GPTConfig.from_folder(folder)
    params, flops_per_token = planning.costs(config)
    state = os.path.join(folder, "state.json")
    tokens = read_json(state)["tokens"] if os.path.exists(state) else None
    inside = os.path.abspath(run).startswith(os.path.abspath(settings.out_dir) + os.sep)
    return Arm(
        arm=name,
        n_layer=config.n_layer,
        params=params,
        tokens=tokens,
        flops=tokens * flops_per_token if tokens is not None else None,
        val_loss=final_loss(run) if os.path.exists(os.path.join(run, "log.csv")) else float("nan"),
        folder=os.path.relpath(run, settings.out_dir) if inside else run,
    )


def rounds(settings, given, grow, reference, n_layer, target):
    """Train the small model, growing it until its loss is ≤ target or it would be as deep as the reference.

    Yields an Arm after each round. Round 1 inherits from the reference; later ones inherit more of it (reinherit) or
    put its next blocks onto the model just trained (onto).
    """
    flags = small_flags(settings, given)
    k = grow.k_start or n_layer // 2
    previous = None
    while True:
        run = os.path.join(settings.out_dir, f"inheritune_{k:02}")
        if previous and grow.growth == "onto":
            start = os.path.join(settings.out_dir, f"onto_{k:02}")
            if not os.path.exists(start):
                small = checkpoint.find(previous, prefer="latest")
                grown = [f"--ckpt={reference}", f"--onto={small}", f"--layers={k}", f"--out={start}"]
                print(inherit.build(inherit.make_parser().parse_args(grown)))
            run_train(flags | {"init_from": start}, run)
        else:
            run_train(flags | {"init_from": reference, "inherit_layers": k}, run)
        arm = arm_of("inheritune", run, settings)
        yield arm
        if arm.val_loss <= target or k + grow.k_step >= n_layer:
            return
        print(f"\n{k} blocks end at {arm.val_loss:.4f}, the reference at {target:.4f}: growing by {grow.k_step}")
        previous, k = run, k + grow.k_step


def controls(settings, given, reference, arms):
    """Train the final small model's architecture from random init: as many steps, and the compute of the pipeline.

    Yields an Arm for each. reference: GPTConfig; arms: what was trained so far. Without the reference's own compute
    (a model from the hub) there is nothing to match, and the second is left out.
    """
    flags = small_flags(settings, given) | {"init_from": "scratch", "n_layer": arms[-1].n_layer}
    for key in ("n_head", "n_embd", "block_size", "bias", "scale_attn_by_inverse_layer_idx"):
        flags[key] = getattr(reference, key)
    run = os.path.join(settings.out_dir, "random")
    run_train(flags, run)
    yield (random := arm_of("random", run, settings))
    if arms[0].flops is None:
        print("\nthe reference's training compute is unknown: no control at the compute of the whole pipeline")
        return
    total = sum(arm.flops for arm in arms)
    flags |= {"max_iters": round(settings.max_iters * total / random.flops), "lr_decay_iters": None}
    run = os.path.join(settings.out_dir, "random_matched")
    run_train(flags, run)
    yield arm_of("random_matched", run, settings)


def plan_reference(path, dataset):
    """(TrainSettings, GPTConfig) of the reference that the train.py config `path` makes on a data folder, which in a
    dry run may not be there yet. Raises UserError."""
    settings, given = parse((TrainSettings,), [path], "")
    settings = dataclasses.replace(settings, dataset=dataset, dry_run=True)
    return settings, planning.make_plan(settings, given, world=1).config


def check(settings, given, grow):
    """The reference's GPTConfig. Raises UserError with every problem that shows before anything is trained."""
    problems = []
    name = reference_name(settings, grow)
    for key in ("init_from", "inherit_layers", "n_layer"):
        if key in given:
            problems.append(f"{key} is decided by the recipe (k_start, k_step): leave it out")
    if grow.reference_config:
        _, config = plan_reference(grow.reference_config, settings.dataset)
    elif os.path.isdir(name) or grow.reference:
        config = planning.source_config(name)
    else:
        raise UserError("there is no reference: set reference to a trained one, or reference_config to train one")
    k = grow.k_start or config.n_layer // 2
    if not 1 <= k < config.n_layer:
        problems.append(f"k_start {k} must be at least 1 and below the reference's {config.n_layer} blocks")
    raise_all(problems)
    if "block_size" in given:
        config = dataclasses.replace(config, block_size=min(settings.block_size, config.block_size))
    return config


def describe(settings, given, grow, config: GPTConfig):
    """The text of --dry_run: the stages, and the plan of the first round."""
    k = grow.k_start or config.n_layer // 2
    depths = [str(d) for d in range(k, config.n_layer, grow.k_step)]
    first = dataclasses.replace(settings, init_from=reference_name(settings, grow), inherit_layers=k)
    small = dataclasses.replace(config, n_layer=k, dropout=settings.dropout)
    batch = planning.split_batch(settings.batch_tokens, small.block_size, settings.batch_size, 1)
    plan = planning.Plan(small, None, [], planning.part_tokens(settings), *batch, 1)
    train_it = f", trained by {grow.reference_config} unless it is there" if grow.reference_config else ""
    control = "random init at equal steps, and at the compute of the pipeline" if grow.control else "none"
    return "\n".join(
        [
            f"reference    {reference_name(settings, grow)}: {config.n_layer} blocks{train_it}",
            f"rounds       {' then '.join(depths)} blocks ({grow.growth}), until validation loss is ≤ the reference's",
            f"controls     {control}",
            "first round:",
            planning.describe(plan, first),
        ]
    )


@one_line
def main(argv=None):
    """Command line: the recipe, its report, its figure."""
    description = "Inheritune: inherit blocks of a reference, train, grow until it is matched; with controls."
    settings, grow, given = parse(
        (TrainSettings, GrowSettings), argv, description, others={"replicate.py": ReplicateSettings}
    )
    config = check(settings, given, grow)
    if settings.dry_run:
        print(describe(settings, given, grow, config))
        return
    folder = find_reference(settings, given, grow)
    target = measure(settings, config, folder)
    print(f"\nreference {folder}: validation loss {target:.4f}")
    name = reference_name(settings, grow)
    reference = arm_of("reference", name if os.path.isdir(name) else folder, settings)
    arms = [dataclasses.replace(reference, val_loss=target)]
    for arm in rounds(settings, given, grow, folder, arms[0].n_layer, target):
        arms.append(arm)
    checkpoint.relink(os.path.join(settings.out_dir, "final"), arms[-1].folder)
    if grow.control:
        arms += controls(settings, given, config, list(arms))
    print("\n" + write_report(settings.out_dir, arms, target))


if __name__ == "__main__":
    main()
