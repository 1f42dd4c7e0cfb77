"""What a run is going to be, worked out and checked before anything is loaded: model, batch, cost.

`make_plan` finds everything that is wrong and says it at once; `describe` is what --dry_run prints.
"""

import dataclasses
import os
from dataclasses import dataclass, field

from inheritune.base.errors import UserError, raise_all
from inheritune.data.reader import GPT2, Tokens, check_tokenizer, identity, read_meta
from inheritune.data.tokenizer import TOKENIZER_FILE
from inheritune.training.cost import PEAKS, flops_per_token, training_memory
from inheritune.training.logs import read_rows
from inheritune.training.settings import HARMLESS, TrainSettings
from inheritune.weights import checkpoint
from model import ARCHITECTURE, GPTConfig, pad_vocab

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
    teacher: GPTConfig | None = None
    resume_from: str | None = None  # the checkpoint folder that this run continues
    damaged: list[str] = field(default_factory=list)  # newer ones that cannot be continued
    tokenizer: dict = field(default_factory=lambda: GPT2)  # of the data: name, n_vocab, eot
    data: str | None = None  # identity of its tokens, where known
    train_tokens: int | None = None  # in this run's part of the corpus; None when the data is not prepared
    sequences: int = 0  # per optimizer step, over all ranks
    micro_batch: int = 0  # sequences per forward pass on one rank
    accumulation: int = 0  # forward passes per step on each rank
    warning: str = ""  # of what is allowed, but hardly meant


def make_plan(settings: TrainSettings, given: frozenset[str], world: int) -> Plan:
    """Check a run's settings against each other, its data and the model it starts from.

    given: the keys set explicitly; world: number of ranks. Raises one UserError with every problem found. A
    dry run may lack its data.
    """
    plan, problems = Plan(world), []
    steps = plan_resume, plan_data, check_settings, plan_model, check_teacher, plan_batch
    for step in steps:
        try:
            for problem in step(plan, settings, given):
                problems.append(problem)
        except UserError as e:  # the step ends here, planning goes on
            problems.append(str(e))
    raise_all(problems)
    return plan


def plan_resume(plan, settings, given):
    """Fill in resume_from, the newest whole checkpoint of out_dir, and the damaged ones after it."""
    out = settings.out_dir
    steps = checkpoint.list_steps(out)
    if settings.dry_run:
        return
    if os.path.exists(os.path.join(out, "config.json")):
        yield f"{out} is a checkpoint, not a run folder: choose another --out_dir"
    elif settings.resume == "never" and (steps or read_rows(os.path.join(out, "log.csv"))):
        yield f"{out} already holds a run: continue it with --resume=auto, or choose another --out_dir"
    elif settings.resume == "must" and not steps:
        yield f"{out} holds no checkpoint to continue (--resume=must); --resume=auto would start afresh"
    elif steps:
        plan.resume_from, plan.damaged = newest_whole(out, steps)
        now = comparable(dataclasses.asdict(settings))
        defaults = dataclasses.asdict(TrainSettings())  # of settings that did not exist when the run began
        before = comparable(defaults | checkpoint.read_state(plan.resume_from)["settings"])
        changed = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if before[k] != now[k]]
        if changed:
            cure = "Restore them, or use another out_dir"
            yield f"cannot continue {out} with other settings: {'; '.join(changed)}. {cure}"


def newest_whole(out, steps):
    """(the newest checkpoint folder that a run can continue from, the damaged ones after it)."""
    damaged = {}  # folder: why
    for step in reversed(steps):
        folder = os.path.join(out, step)
        try:
            checkpoint.examine(folder)
            return folder, list(damaged)
        except UserError as e:
            damaged[folder] = str(e)
    why = next(iter(damaged.values()))
    raise UserError(f"{out} holds no whole checkpoint to continue ({why}): restore one, or delete {out}")


def comparable(settings: dict) -> dict:
    """The settings that a continued run must share, with the end of the schedule spelled out."""
    kept = {k: v for k, v in settings.items() if k not in HARMLESS}
    if kept.get("lr_decay_iters") is None:
        kept["lr_decay_iters"] = settings.get("max_iters")
    return kept


def plan_data(plan, settings, given):
    """Fill in tokenizer, data and train_tokens."""
    if os.path.isdir(settings.dataset) or not settings.dry_run:
        plan.tokenizer = read_meta(settings.dataset)["tokenizer"]
        plan.data = identity(settings.dataset)
        plan.train_tokens = part_tokens(settings)
    before = plan.resume_from and checkpoint.read_state(plan.resume_from).get("data")
    if before and plan.data and before != plan.data:
        cure = "restore them, or use another out_dir"
        yield f"{settings.dataset} holds other tokens than {settings.out_dir} was trained on: {cure}"


def part_tokens(settings: TrainSettings) -> int | None:
    """Tokens in a run's part of the training stream, or None when the data is not prepared."""
    if not os.path.isdir(settings.dataset):
        return None
    length = len(Tokens(settings.dataset, "train"))
    return int(length * settings.data_end) - int(length * settings.data_start)


def check_settings(plan, settings, given):
    if settings.data_start >= settings.data_end:
        yield f"data_start {settings.data_start} is not below data_end {settings.data_end}"
    if settings.min_lr > settings.learning_rate:
        yield f"min_lr {settings.min_lr:g} is above learning_rate {settings.learning_rate:g}: set both"
    if settings.shard and settings.optimizer == "muon":
        yield "optimizer=muon needs whole matrices and shard=True cuts them: choose one of the two"
    end = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    if settings.warmup_iters >= min(end, settings.max_iters):
        took = f"warm-up takes {settings.warmup_iters:,} steps of {min(end, settings.max_iters):,}"
        plan.warning = f"warning: {took}, so there is no decay: lower warmup_iters"


def plan_model(plan, settings, given):
    """Fill in config: that of the checkpoint to resume, of the settings, or of the model to start from."""
    # a dry run takes the architecture from the settings when the model to start from is not there
    name, scratch = settings.init_from, settings.init_from == "scratch"
    there = os.path.isdir(name) or name in RELEASED
    assumed = settings.dry_run and not there and {"n_head", "n_embd"} <= given
    if plan.resume_from:
        plan.config = dataclasses.replace(GPTConfig.from_folder(plan.resume_from), dropout=settings.dropout)
    elif name == "resume":
        yield "init_from = resume is nanoGPT's: write resume = auto; the run in out_dir is continued"
    elif scratch or assumed:
        if settings.n_embd % settings.n_head:
            yield f"n_embd {settings.n_embd} is not a multiple of n_head {settings.n_head}"
        if scratch and settings.inherit_layers is not None:
            yield "inherit_layers needs a model to inherit from: set init_from"
        sizes = {key: getattr(settings, key) for key in (*ARCHITECTURE, "dropout")}
        if assumed and settings.inherit_layers:
            sizes["n_layer"] = settings.inherit_layers
        if settings.teacher:
            assume_tokenizer(plan, source_config(settings.teacher))
        rows = pad_vocab(plan.tokenizer["n_vocab"])
        plan.config = GPTConfig(**sizes, vocab_size=rows, **of_tokenizer(plan.tokenizer))
    else:
        yield from plan_inherited(plan, settings, given, source_config(name))


def of_tokenizer(tokenizer):
    """What a GPTConfig says of the tokenizer in a data folder's meta.json."""
    return {"tokenizer": tokenizer["name"], "n_vocab": tokenizer["n_vocab"], "eot": tokenizer["eot"]}


def assume_tokenizer(plan, source):
    """For a dry run before the data is there: take it to be tokenised as the model `source` needs it."""
    if plan.train_tokens is None and source.tokenizer:
        plan.tokenizer = {"name": source.tokenizer, "n_vocab": source.n_vocab, "eot": source.eot}


def source_config(init_from: str) -> GPTConfig:
    """The GPTConfig of a model to start from, before its weights are fetched."""
    if init_from in RELEASED and not os.path.isdir(init_from):
        n_layer, n_head, n_embd = RELEASED[init_from]
        return GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return GPTConfig.from_folder(checkpoint.find(init_from, weights=False))


def plan_inherited(plan, settings, given, source):
    """Fill in the config of a model that starts from a checkpoint with the config `source`: only depth, a
    shorter context and dropout may differ."""
    assume_tokenizer(plan, source)
    prepared = plan.train_tokens is not None
    name, theirs = settings.init_from, plan.tokenizer
    changes = {"n_layer": settings.inherit_layers or source.n_layer, "dropout": settings.dropout}
    if changes["n_layer"] > source.n_layer:
        yield f"inherit_layers {changes['n_layer']} is more than the {source.n_layer} blocks of {name}"
    for key in ARCHITECTURE:
        asked, has = getattr(settings, key), changes.get(key, getattr(source, key))
        if key in given and asked != has and key != "block_size":
            yield f"{key} {asked} was asked for, but the model from {name} has {has}: leave it out"
    if "block_size" in given:
        changes["block_size"] = settings.block_size
        if settings.block_size > source.block_size:
            yield f"block_size {settings.block_size} is above the {source.block_size} positions of {name}"

    # a model that does not say what tokenizer it was trained with takes the data's
    if source.tokenizer not in ("", theirs["name"]):
        yield (
            f"{settings.dataset} was tokenised with {theirs['name']!r}, but {name} was trained with "
            f"{source.tokenizer!r}: prepare the data with that one"
        )
    elif theirs["n_vocab"] > source.vocab_size:
        yield f"{settings.dataset} has {theirs['n_vocab']} ids, {name} only {source.vocab_size}"
    elif source.tokenizer == TOKENIZER_FILE and prepared:
        check_tokenizer(settings.dataset, checkpoint.find(name, weights=False), source)
    elif not source.tokenizer:
        changes |= of_tokenizer(theirs)
    plan.config = dataclasses.replace(source, **changes)


def check_teacher(plan, settings, given):
    """Fill in teacher. Its vocabulary may be padded, as that of a model to start from."""
    if not settings.teacher or not plan.config:
        return
    name, theirs, block_size = settings.teacher, plan.tokenizer, plan.config.block_size
    teacher = source_config(name)
    if teacher.tokenizer not in ("", theirs["name"]) or theirs["n_vocab"] > teacher.vocab_size:
        yield (
            f"teacher {name} has the {teacher.n_vocab} ids of {teacher.tokenizer!r}, the student the "
            f"{theirs['n_vocab']} of {theirs['name']!r}: they must be the same vocabulary"
        )
    elif teacher.block_size < block_size:
        yield f"teacher {name} reads {teacher.block_size} tokens, the student {block_size}: too short"
    plan.teacher = teacher


def plan_batch(plan, settings, given):
    """Fill in sequences, micro_batch and accumulation."""
    if not plan.config:
        return
    T, tokens = plan.config.block_size, plan.train_tokens
    if tokens is not None and tokens <= T:
        yield f"this run's part of {settings.dataset} has {tokens:,} tokens, fewer than block_size + 1"
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
    c, s = plan.config, settings
    total_tokens = s.max_iters * s.batch_tokens
    flops = flops_per_token(c, plan.teacher) * total_tokens
    blocks = f", its first {s.inherit_layers} blocks" if s.inherit_layers else ""
    data = f"not prepared: {plan.tokenizer['n_vocab']:,} ids are assumed"
    if plan.train_tokens is not None:
        data = f"{plan.train_tokens:,} tokens, {total_tokens / plan.train_tokens:.2f} epochs"
    lines = [
        f"model        {c.n_layer} blocks x {c.n_head} heads x {c.n_embd}, context {c.block_size}, "
        f"{c.vocab_size} ids",
        f"parameters   {c.num_params:,}",
        f"starts from  {s.init_from}{blocks}",
        f"batch        {s.batch_tokens:,} tokens = {plan.micro_batch} sequences x {c.block_size} tokens x "
        f"{plan.accumulation} accumulation x {plan.world} rank(s)",
        f"training     {s.max_iters:,} steps, {total_tokens:,} tokens",
        f"data         {s.dataset}: {data}",
        f"compute      {flops:.3g} FLOPs{', the teacher among them' if plan.teacher else ''}",
    ]
    lines += [plan.warning] if plan.warning else []
    return "\n".join(lines + describe_cost(plan, settings, flops))


def describe_cost(plan, settings, flops):
    """Lines on memory, on one GPU and in shards, and on the time that each kind of GPU takes."""
    world = plan.world if plan.world > 1 else 8
    terms = [run_memory(plan, settings, shards) for shards in (1, world)]
    whole, shared = (sum(t.values()) / 1e9 for t in terms)
    parts = [", ".join(f"{name} {size / 1e9:.1f}" for name, size in t.items()) for t in terms]
    lines = [
        f"memory       about {whole:.1f} GB per GPU, the allocator's overhead not counted:",
        f"               {parts[0]}",
        f"             about {shared:.1f} GB on each of {world} with shard=True:",
        f"               {parts[1]}",
        f"time         at {ASSUMED_MFU:.0%} of the bf16 peak (an assumption), without validation:",
    ]
    for name, (peak, gigabytes) in PEAKS.items():
        seconds, room = flops / (peak * 1e12 * ASSUMED_MFU), 0.9 * gigabytes
        cure = (
            "shard=True, or lower batch_size" if shared < room and not settings.shard else "lower batch_size"
        )
        fits = (shared if settings.shard else whole) < room
        note = "" if fits else f"   does not fit {gigabytes} GB: {cure}"
        lines.append(f"  {name:22} {duration(seconds):>12} on 1, {duration(seconds / 8):>12} on 8{note}")
    return lines


def run_memory(plan: Plan, settings: TrainSettings, shards: int) -> dict[str, float]:
    """cost.training_memory of a planned run; on a GPU unless the settings say otherwise."""
    s, cpu = settings, settings.device == "cpu"
    return training_memory(
        plan.config,
        plan.micro_batch,
        plan.accumulation,
        half=not (s.dtype == "float32" or (s.dtype == "auto" and cpu)),
        shards=shards,
        checkpoint_activations=s.checkpoint_activations,
        compiled=not cpu if s.compile is None else s.compile,
        teacher=plan.teacher,
        ranks=plan.world if shards == 1 else 1,
    )


def duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves a number of at least 1."""
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    unit = next((unit for unit, size in units.items() if seconds >= size), "s")
    return f"{seconds / units.get(unit, 1):.1f} {unit}"
