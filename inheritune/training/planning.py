"""What a run is going to be, worked out and checked before anything is loaded: model, batch arithmetic, cost.

`make_plan` finds everything that is wrong and says it at once; `describe` is what --dry_run prints.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from inheritune.base.errors import UserError, raise_all
from inheritune.data.reader import GPT2, Tokens, check_tokenizer, read_meta
from inheritune.data.tokenizer import TOKENIZER_FILE
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


@dataclass
class Plan:
    """What train.py needs to know beyond the settings."""

    world: int  # ranks
    config: GPTConfig | None = None  # of the model that will be trained
    resume_from: str | None = None  # the checkpoint folder that this run continues
    damaged: list[str] = field(default_factory=list)  # newer ones that cannot be continued
    tokenizer: dict = field(default_factory=lambda: GPT2)  # of the data: name, n_vocab, eot
    train_tokens: int | None = None  # in this run's part of the corpus; None when the data is not prepared
    sequences: int = 0  # per optimizer step, over all ranks
    micro_batch: int = 0  # sequences per forward pass on one rank
    accumulation: int = 0  # forward passes per step on each rank


def make_plan(settings: TrainSettings, given: frozenset[str], world: int) -> Plan:
    """Check a run's settings against each other, its data and the model it starts from.

    given: the keys set explicitly; world: number of ranks. Raises one UserError with every problem found. A
    dry run may lack its data.
    """
    plan = Plan(world)
    steps = [
        plan_resume(plan, settings),
        plan_data(plan, settings),
        check_settings(settings),
        plan_model(plan, settings, given),
        check_teacher(plan, settings),
        plan_batch(plan, settings),
    ]
    raise_all([problem for step in steps for problem in problems_of(step)])
    return plan


def problems_of(step: Iterable[str]) -> Iterator[str]:
    """The problems that a step of planning yields; a UserError that it raises is its last."""
    try:
        yield from step
    except UserError as e:
        yield str(e)


def plan_resume(plan, settings):
    """Fill in resume_from, the newest whole checkpoint of out_dir, and the damaged ones after it."""
    out = settings.out_dir
    steps = checkpoint.list_steps(out)
    begun = bool(steps) or bool(read_rows(os.path.join(out, "log.csv")))
    if settings.dry_run:
        return
    if os.path.exists(os.path.join(out, "config.json")):
        yield f"{out} is a checkpoint, not a run folder: choose another --out_dir"
    elif settings.resume == "never" and begun:
        yield f"{out} already holds a run: continue it with --resume=auto, or choose another --out_dir"
    elif settings.resume == "must" and not steps:
        yield f"{out} holds no checkpoint to continue (--resume=must); --resume=auto would start afresh"
    elif steps:
        plan.resume_from, plan.damaged = newest_whole(out, steps)
        yield from changed_settings(plan.resume_from, settings)


def newest_whole(out, steps):
    """(the newest checkpoint folder that a run can continue from, the damaged ones after it)."""
    damaged, why = [], []
    for step in reversed(steps):
        folder = os.path.join(out, step)
        try:
            checkpoint.examine(folder)
            return folder, damaged
        except UserError as e:
            damaged.append(folder)
            why.append(str(e))
    raise UserError(f"{out} holds no whole checkpoint to continue ({why[0]}): restore one, or delete {out}")


def changed_settings(folder, settings):
    """A continued run must have the settings it began with, except for harmless ones."""
    now = comparable(dataclasses.asdict(settings))
    defaults = dataclasses.asdict(TrainSettings())  # of settings that did not exist when the run began
    before = comparable(defaults | checkpoint.read_state(folder)["settings"])
    changed = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if before[k] != now[k]]
    if changed:
        yield (
            f"cannot continue {settings.out_dir} with other settings: {'; '.join(changed)}. Restore them, or "
            "use another out_dir"
        )


def comparable(settings: dict) -> dict:
    """The settings that a continued run must share, with the end of the schedule spelled out."""
    kept = {k: v for k, v in settings.items() if k not in HARMLESS}
    if kept.get("lr_decay_iters") is None:
        kept["lr_decay_iters"] = settings.get("max_iters")
    return kept


def plan_data(plan, settings):
    """Fill in tokenizer and train_tokens."""
    if os.path.isdir(settings.dataset) or not settings.dry_run:
        plan.tokenizer = read_meta(settings.dataset)["tokenizer"]
        plan.train_tokens = part_tokens(settings)
    yield from ()


def part_tokens(settings: TrainSettings) -> int | None:
    """Tokens in a run's part of the training stream, or None when the data is not prepared."""
    if not os.path.isdir(settings.dataset):
        return None
    length = len(Tokens(settings.dataset, "train"))
    return int(length * settings.data_end) - int(length * settings.data_start)


def check_settings(settings):
    if settings.data_start >= settings.data_end:
        yield f"data_start {settings.data_start} is not below data_end {settings.data_end}"
    if settings.min_lr > settings.learning_rate:
        yield f"min_lr {settings.min_lr:g} is above learning_rate {settings.learning_rate:g}: set both"
    if settings.shard and settings.optimizer == "muon":
        yield "optimizer=muon needs whole matrices and shard=True cuts them: choose one of the two"


def plan_model(plan, settings, given):
    """Fill in config: that of the checkpoint to resume, of the settings, or of the model to start from."""
    if plan.resume_from:
        plan.config = dataclasses.replace(GPTConfig.from_folder(plan.resume_from), dropout=settings.dropout)
        return
    # a dry run takes the architecture from the settings when the model to start from is not there
    there = os.path.isdir(settings.init_from) or settings.init_from in RELEASED
    assumed = settings.dry_run and not there and {"n_head", "n_embd"} <= given
    if settings.init_from == "scratch" or assumed:
        if settings.n_embd % settings.n_head:
            yield f"n_embd {settings.n_embd} is not a multiple of n_head {settings.n_head}"
        if settings.init_from == "scratch" and settings.inherit_layers is not None:
            yield "inherit_layers needs a model to inherit from: set init_from"
        depth = settings.inherit_layers if assumed and settings.inherit_layers else settings.n_layer
        plan.config = dataclasses.replace(scratch_config(settings, plan.tokenizer), n_layer=depth)
        return
    if settings.init_from == "resume":
        raise UserError(
            "init_from = resume is nanoGPT's: write resume = auto; the run in out_dir is continued"
        )
    yield from plan_inherited(plan, settings, given, source_config(settings.init_from))


def scratch_config(settings, tokenizer):
    """The architecture that the settings ask for."""
    names = (*ARCHITECTURE, "block_size", "dropout")
    return GPTConfig(
        **{name: getattr(settings, name) for name in names},
        vocab_size=pad_vocab(tokenizer["n_vocab"]),
        n_vocab=tokenizer["n_vocab"],
        tokenizer=tokenizer["name"],
        eot=tokenizer["eot"],
    )


def source_config(init_from: str) -> GPTConfig:
    """The GPTConfig of a model to start from, before its weights are fetched."""
    if init_from in RELEASED and not os.path.isdir(init_from):
        n_layer, n_head, n_embd = RELEASED[init_from]
        return GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return GPTConfig.from_folder(checkpoint.find(init_from, weights=False))


def plan_inherited(plan, settings, given, source):
    """Fill in the config of a model that starts from a checkpoint with the config `source`: only depth, a
    shorter context and dropout may differ."""
    name, theirs = settings.init_from, plan.tokenizer
    k = settings.inherit_layers or source.n_layer
    config = dataclasses.replace(source, n_layer=k, dropout=settings.dropout)
    if k > source.n_layer:
        yield f"inherit_layers {k} is more than the {source.n_layer} blocks of {name}"
    for key in ARCHITECTURE:
        asked, has = getattr(settings, key), getattr(config, key)
        if key in given and asked != has:
            yield f"{key} {asked} was asked for, but the model from {name} has {has}: leave it out"
    if "block_size" in given:
        if settings.block_size > source.block_size:
            yield f"block_size {settings.block_size} is above the {source.block_size} positions of {name}"
        config = dataclasses.replace(config, block_size=settings.block_size)

    # a model that does not say what tokenizer it was trained with takes the data's
    if source.tokenizer and source.tokenizer != theirs["name"]:
        yield (
            f"{settings.dataset} was tokenised with {theirs['name']!r}, but {name} was trained with "
            f"{source.tokenizer!r}: prepare the data with that one"
        )
    elif theirs["n_vocab"] > source.vocab_size:
        yield f"{settings.dataset} has {theirs['n_vocab']} ids, {name} only {source.vocab_size}"
    elif source.tokenizer == TOKENIZER_FILE:
        check_tokenizer(settings.dataset, checkpoint.find(name, weights=False), source)
    if not source.tokenizer:
        config = dataclasses.replace(
            config, tokenizer=theirs["name"], n_vocab=theirs["n_vocab"], eot=theirs["eot"]
        )
    plan.config = config


def check_teacher(plan, settings):
    if not settings.teacher or not plan.config:
        return
    name, config = settings.teacher, plan.config
    teacher = source_config(name)
    if (teacher.n_vocab, teacher.tokenizer or config.tokenizer) != (config.n_vocab, config.tokenizer):
        yield (
            f"teacher {name} has the {teacher.n_vocab} ids of {teacher.tokenizer!r}, the student the "
            f"{config.n_vocab} of {config.tokenizer!r}: they must be the same vocabulary"
        )
    elif teacher.block_size < config.block_size:
        yield f"teacher {name} reads {teacher.block_size} tokens, the student {config.block_size}: too short"


def plan_batch(plan, settings):
    """Fill in sequences, micro_batch and accumulation."""
    if not plan.config:
        return
    T = plan.config.block_size
    if plan.train_tokens is not None and plan.train_tokens <= T:
        yield (
            f"this run's part of {settings.dataset} has {plan.train_tokens:,} tokens, fewer than "
            "block_size + 1"
        )
    split = split_batch(settings.batch_tokens, T, settings.batch_size, plan.world)
    plan.sequences, plan.micro_batch, plan.accumulation = split


def split_batch(batch_tokens: int, block_size: int, batch_size: int, world: int) -> tuple[int, int, int]:
    """(sequences per step, micro-batch, accumulation steps): world × micro × accumulation = sequences.

    The micro-batch is the largest divisor up to batch_size. Raises UserError naming the nearest batch_tokens
    that fit.
    """
    unit = block_size * world
    if batch_tokens % unit:
        below = batch_tokens // unit * unit
        near = f"{below + unit:,}" if below == 0 else f"{below:,} or {below + unit:,}"
        raise UserError(
            f"batch_tokens {batch_tokens:,} is not a multiple of block_size × ranks = "
            f"{block_size:,} × {world}: use {near}"
        )
    per_rank = batch_tokens // unit
    micro = next(m for m in range(min(batch_size, per_rank), 0, -1) if per_rank % m == 0)
    return per_rank * world, micro, per_rank // micro


def describe(plan: Plan, settings: TrainSettings) -> str:
    """The text of --dry_run."""
    c = plan.config
    n_params, flops_per_token = costs(c)
    total_tokens = settings.max_iters * settings.batch_tokens
    origin = settings.init_from
    if settings.inherit_layers:
        origin += f", its first {settings.inherit_layers} blocks"
    data = f"{settings.dataset}: not prepared"
    if plan.train_tokens is not None:
        epochs = total_tokens / plan.train_tokens
        data = f"{settings.dataset}: {plan.train_tokens:,} tokens, {epochs:.2f} epochs"
    lines = [
        f"model        {c.n_layer} blocks x {c.n_head} heads x {c.n_embd}, context {c.block_size}, "
        f"{c.vocab_size} ids",
        f"parameters   {n_params:,}",
        f"starts from  {origin}",
        f"batch        {settings.batch_tokens:,} tokens = {plan.micro_batch} sequences x {c.block_size} "
        f"tokens x {plan.accumulation} accumulation x {plan.world} rank(s)",
        f"training     {settings.max_iters:,} steps, {total_tokens:,} tokens",
        f"data         {data}",
        f"compute      {flops_per_token * total_tokens:.3g} FLOPs",
    ]
    return "\n".join(lines + describe_cost(plan, settings, flops_per_token * total_tokens))


def describe_cost(plan, settings, flops):
    """Lines on memory, on one GPU and in shards, and on the time that each kind of GPU takes."""
    world = plan.world if plan.world > 1 else 8
    how = (plan.config, plan.micro_batch, plan.accumulation, settings.dtype != "float32")
    terms = [training_memory(*how, n, settings.checkpoint_activations) for n in (1, world)]
    whole, shared = (sum(t.values()) / 1e9 for t in terms)
    parts = [", ".join(f"{name} {size / 1e9:.1f}" for name, size in t.items()) for t in terms]
    lines = [
        f"memory       about {whole:.1f} GB per GPU, the allocator's overhead not counted:",
        f"               {parts[0]}",
        f"             about {shared:.1f} GB on each of {world} with shard=True:",
        f"               {parts[1]}",
        f"time         at {ASSUMED_MFU:.0%} of the bf16 peak (an assumption), without validation:",
    ]
    memory = shared if settings.shard else whole
    for name, (peak, gigabytes) in PEAKS.items():
        seconds = flops / (peak * 1e12 * ASSUMED_MFU)
        cure = "lower batch_size"
        if not settings.shard and shared < 0.9 * gigabytes:
            cure = "shard=True, or lower batch_size"
        fits = "" if memory < 0.9 * gigabytes else f"   does not fit {gigabytes} GB: {cure}"
        lines.append(f"  {name:10} {duration(seconds):>12} on 1, {duration(seconds / 8):>12} on 8{fits}")
    return lines


def duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves a number of at least 1."""
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 0))
    unit, size = next((unit, size) for unit, size in units if seconds >= size)
    return f"{seconds / (size or 1):.1f} {unit}"
