"""What a run is going to be, worked out and checked before anything is loaded: model, batch arithmetic, cost.

`make_plan` collects everything that is wrong and says it at once; `describe` is what --dry_run prints.
"""

import dataclasses
import os
from dataclasses import dataclass

from inheritune.base.errors import UserError, raise_all
from inheritune.data.reader import GPT2, Tokens, read_meta
from inheritune.training.cost import PEAKS, costs, training_memory
from inheritune.training.logs import read_rows
from inheritune.training.settings import HARMLESS, TrainSettings
from inheritune.weights import checkpoint
from model import GPTConfig, pad_vocab

ARCHITECTURE = ["n_layer", "n_head", "n_embd", "bias", "scale_attn_by_inverse_layer_idx"]
RELEASED = {  # the four released GPT-2s: layers, heads, width
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
ASSUMED_MFU = 0.4  # of the device's peak, for time estimates


@dataclass(frozen=True)
class Plan:
    """The outcome of planning: what train.py needs to know beyond the settings."""

    config: GPTConfig  # of the model that will be trained
    resume_from: str | None  # the checkpoint folder that this run continues
    damaged: list[str]  # newer ones that cannot be continued
    train_tokens: int | None  # in this run's part of the corpus; None when the data is not prepared
    sequences: int  # per optimizer step, over all ranks
    micro_batch: int  # sequences per forward pass on one rank
    accumulation: int  # forward passes per step on each rank
    world: int


def split_batch(batch_tokens, block_size, batch_size, world):
    """(sequences per step, micro-batch, accumulation steps) such that world × micro × accumulation = sequences.

    The micro-batch is the largest divisor up to batch_size. Raises UserError naming the nearest batch_tokens that fit.
    """
    unit = block_size * world
    if batch_tokens % unit:
        below = batch_tokens // unit * unit
        near = f"{below + unit:,}" if below == 0 else f"{below:,} or {below + unit:,}"
        raise UserError(
            f"batch_tokens {batch_tokens:,} is not a multiple of block_size × ranks = {block_size:,} × {world}: "
            f"use {near}"
        )
    per_rank = batch_tokens // unit
    micro = next(m for m in range(min(batch_size, per_rank), 0, -1) if per_rank % m == 0)
    return per_rank * world, micro, per_rank // micro


def source_config(init_from):
    """The GPTConfig of a model to start from, before its weights are fetched. Raises UserError."""
    if init_from in RELEASED and not os.path.isdir(init_from):
        n_layer, n_head, n_embd = RELEASED[init_from]
        return GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return GPTConfig.from_folder(checkpoint.find(init_from, weights=False))


def make_plan(settings, given, world):
    """Check a run's settings against each other, its data and the model it starts from.

    given: the keys set explicitly; world: number of ranks. Raises UserError with every problem found. A dry run may
    lack its data.
    """
    problems = []

    def attempt(work, otherwise=None):
        try:
            return work()
        except UserError as e:
            problems.append(str(e))
            return otherwise

    resume_from, damaged = attempt(lambda: resumable(settings), (None, []))
    tokenizer, train_tokens = GPT2, None
    if os.path.isdir(settings.dataset) or not settings.dry_run:
        tokenizer = attempt(lambda: read_meta(settings.dataset)["tokenizer"], GPT2)
        if not problems:
            train_tokens = attempt(lambda: part_tokens(settings))
    if settings.data_start >= settings.data_end:
        problems.append(f"data_start {settings.data_start} is not below data_end {settings.data_end}")
    if settings.min_lr > settings.learning_rate:
        problems.append(
            f"min_lr {settings.min_lr:g} is above learning_rate {settings.learning_rate:g}: set both"
        )
    if resume_from:
        config = dataclasses.replace(GPTConfig.from_folder(resume_from), dropout=settings.dropout)
    elif settings.init_from == "scratch":
        config = scratch_config(settings, tokenizer, problems)
        if settings.inherit_layers is not None:
            problems.append("inherit_layers needs a model to inherit from: set init_from")
    elif settings.dry_run and assumed(settings, given):
        depth = settings.inherit_layers or settings.n_layer
        config = dataclasses.replace(scratch_config(settings, tokenizer, problems), n_layer=depth)
    else:
        source = attempt(lambda: source_config(settings.init_from))
        raise_all(problems if source is None else [])  # nothing more can be said without it
        config = inherited_config(settings, given, source, tokenizer, problems)
    if settings.shard and settings.optimizer == "muon":
        problems.append("optimizer=muon needs whole matrices and shard=True cuts them: choose one of the two")
    if settings.teacher:
        attempt(lambda: check_teacher(settings.teacher, config))
    batch = (settings.batch_tokens, config.block_size, settings.batch_size, world)
    sequences, micro, accumulation = attempt(lambda: split_batch(*batch), (0, 0, 0))
    if train_tokens is not None and train_tokens <= config.block_size:
        problems.append(
            f"this run's part of {settings.dataset} has {train_tokens:,} tokens, fewer than block_size + 1"
        )
    raise_all(problems)
    return Plan(config, resume_from, damaged, train_tokens, sequences, micro, accumulation, world)


def check_teacher(name, config):
    """Raise UserError unless the model called `name` can teach a student with `config`."""
    teacher = source_config(name)
    if (teacher.n_vocab, teacher.tokenizer or config.tokenizer) != (config.n_vocab, config.tokenizer):
        raise UserError(
            f"teacher {name} has the {teacher.n_vocab} ids of {teacher.tokenizer!r}, the student the {config.n_vocab} "
            f"of {config.tokenizer!r}: they must be the same vocabulary"
        )
    if teacher.block_size < config.block_size:
        raise UserError(
            f"teacher {name} reads {teacher.block_size} tokens, the student {config.block_size}: too short"
        )


def assumed(settings, given):
    """Whether a dry run must take the architecture from the settings, because the model to start from is not there."""
    there = os.path.isdir(settings.init_from) or settings.init_from in RELEASED
    return not there and {"n_head", "n_embd"} <= given


def part_tokens(settings):
    """Tokens in a run's part of the training stream, or None when the data is not prepared. Raises UserError."""
    if not os.path.isdir(settings.dataset):
        return None
    length = len(Tokens(settings.dataset, "train"))
    return int(length * settings.data_end) - int(length * settings.data_start)


def scratch_config(settings, tokenizer, problems):
    """The architecture that the settings ask for."""
    if settings.n_embd % settings.n_head:
        problems.append(f"n_embd {settings.n_embd} is not a multiple of n_head {settings.n_head}")
    names = (*ARCHITECTURE, "block_size", "dropout")
    return GPTConfig(
        **{name: getattr(settings, name) for name in names},
        vocab_size=pad_vocab(tokenizer["n_vocab"]),
        n_vocab=tokenizer["n_vocab"],
        tokenizer=tokenizer["name"],
        eot=tokenizer["eot"],
    )


def inherited_config(settings, given, source, tokenizer, problems):
    """The architecture that comes from a checkpoint; only depth, a shorter context and dropout may differ."""
    k = settings.inherit_layers or source.n_layer
    if k > source.n_layer:
        problems.append(
            f"inherit_layers {k} is more than the {source.n_layer} blocks of {settings.init_from}"
        )
    config = dataclasses.replace(source, n_layer=k, dropout=settings.dropout)
    for name in ARCHITECTURE:
        if name in given and getattr(settings, name) != getattr(config, name):
            problems.append(
                f"{name} {getattr(settings, name)} was asked for, but the model from {settings.init_from} has "
                f"{getattr(config, name)}: leave it out"
            )
    if "block_size" in given:
        if settings.block_size > source.block_size:
            problems.append(
                f"block_size {settings.block_size} is above the {source.block_size} positions of {settings.init_from}"
            )
        config = dataclasses.replace(config, block_size=settings.block_size)
    if source.tokenizer and source.tokenizer != tokenizer["name"]:
        problems.append(
            f"{settings.dataset} was tokenised with {tokenizer['name']!r}, but {settings.init_from} was trained with "
            f"{source.tokenizer!r}: prepare the data with that one"
        )
    elif tokenizer["n_vocab"] > source.vocab_size:
        problems.append(
            f"{settings.dataset} has {tokenizer['n_vocab']} ids, {settings.init_from} only {source.vocab_size}"
        )
    if not source.tokenizer:
        names = {"tokenizer": tokenizer["name"], "n_vocab": tokenizer["n_vocab"], "eot": tokenizer["eot"]}
        config = dataclasses.replace(config, **names)
    return config


def resumable(settings):
    """(the newest whole checkpoint of out_dir if this run is to continue it, else None; the damaged ones after it).
    Raises UserError.

    A continued run must have the settings it began with, except for harmless ones.
    """
    out = settings.out_dir
    steps = checkpoint.list_steps(out)
    begun = bool(steps) or bool(read_rows(os.path.join(out, "log.csv")))
    if settings.dry_run:
        return None, []
    if os.path.exists(os.path.join(out, "config.json")):
        raise UserError(f"{out} is a checkpoint, not a run folder: choose another --out_dir")
    if settings.resume == "never" and begun:
        raise UserError(
            f"{out} already holds a run: continue it with --resume=auto, or choose another --out_dir"
        )
    if settings.resume == "must" and not steps:
        raise UserError(
            f"{out} holds no checkpoint to continue (--resume=must); --resume=auto would start afresh"
        )
    if not steps:
        return None, []
    damaged, why = [], []
    for step in reversed(steps):
        folder = os.path.join(out, step)
        try:
            checkpoint.examine(folder)
            break
        except UserError as e:
            damaged.append(folder)
            why.append(str(e))
    else:
        raise UserError(
            f"{out} holds no whole checkpoint to continue ({why[0]}): restore one, or delete {out}"
        )
    now = comparable(dataclasses.asdict(settings))
    defaults = dataclasses.asdict(TrainSettings())  # of settings that did not exist when the run began
    before = comparable(defaults | checkpoint.read_state(folder)["settings"])
    changed = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if before[k] != now[k]]
    if changed:
        raise UserError(
            f"cannot continue {out} with other settings: {'; '.join(changed)}. Restore them, or use another out_dir"
        )
    return folder, damaged


def comparable(settings):
    """The settings (a dict) that a continued run must share, with the end of the schedule spelled out."""
    kept = {k: v for k, v in settings.items() if k not in HARMLESS}
    if kept.get("lr_decay_iters") is None:
        kept["lr_decay_iters"] = settings.get("max_iters")
    return kept


def describe(plan, settings):
    """The text of --dry_run."""
    c = plan.config
    n_params, flops_per_token = costs(c)
    total_tokens = settings.max_iters * settings.batch_tokens
    flops = flops_per_token * total_tokens
    origin = settings.init_from
    if settings.inherit_layers:
        origin += f", its first {settings.inherit_layers} blocks"
    lines = [
        f"model        {c.n_layer} blocks x {c.n_head} heads x {c.n_embd}, context {c.block_size}, {c.vocab_size} ids",
        f"parameters   {n_params:,}",
        f"starts from  {origin}",
        f"batch        {settings.batch_tokens:,} tokens = {plan.micro_batch} sequences x {c.block_size} tokens"
        f" x {plan.accumulation} accumulation x {plan.world} rank(s)",
        f"training     {settings.max_iters:,} steps, {total_tokens:,} tokens",
    ]
    if plan.train_tokens is None:
        lines.append(f"data         {settings.dataset}: not prepared")
    else:
        epochs = total_tokens / plan.train_tokens
        lines.append(f"data         {settings.dataset}: {plan.train_tokens:,} tokens, {epochs:.2f} epochs")
    world = plan.world if plan.world > 1 else 8
    half = settings.dtype != "float32"
    how = (c, plan.micro_batch, plan.accumulation, half)
    terms = [training_memory(*how, n, settings.checkpoint_activations) for n in (1, world)]
    whole, shared = (sum(t.values()) / 1e9 for t in terms)
    memory = shared if settings.shard else whole
    lines += [
        f"compute      {flops:.3g} FLOPs",
        f"memory       about {whole:.1f} GB per GPU (weights, gradients, AdamW, activations; no allocator overhead),",
        f"             about {shared:.1f} GB on each of {world} with shard=True",
    ]
    lines.append(f"time         at {ASSUMED_MFU:.0%} of the bf16 peak (an assumption), without validation:")
    for name, (peak, gigabytes) in PEAKS.items():
        seconds = flops / (peak * 1e12 * ASSUMED_MFU)
        cure = (
            "lower batch_size"
            if settings.shard or shared >= 0.9 * gigabytes
            else "shard=True, or lower batch_size"
        )
        fits = "" if memory < 0.9 * gigabytes else f"   does not fit {gigabytes} GB: {cure}"
        lines.append(f"  {name:10} {duration(seconds):>12} on 1, {duration(seconds / 8):>12} on 8{fits}")
    return "\n".join(lines)


def duration(seconds):
    """Seconds in the largest unit that leaves a number of at least 1."""
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 0))
    unit, size = next((unit, size) for unit, size in units if seconds >= size)
    return f"{seconds / (size or 1):.1f} {unit}"
