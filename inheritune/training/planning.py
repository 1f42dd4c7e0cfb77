"""What a run is going to be, worked out and checked before anything is loaded: model, batch, cost.

`make_plan` finds everything that is wrong and says it at once; `plan_text` is what --dry_run prints.
"""

import dataclasses
import functools
import os
from dataclasses import dataclass, field

from inheritune.base.errors import UserError, noting, raise_all
from inheritune.data.reader import Tokens, check_tokenizer, identity, read_meta
from inheritune.models.open_model import Config, open_config, open_weights
from inheritune.training.cost import flops_with_teacher, training_memory
from inheritune.training.device import PEAKS
from inheritune.training.logs import read_rows
from inheritune.training.schedule import decay_end, learning_rate
from inheritune.training.settings import HARMLESS, SCHEDULE, TrainSettings
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
    config: Config | None = None  # of the model that will be trained
    teacher: Config | None = None
    resume_from: str | None = None  # the checkpoint folder that this run continues
    damaged: dict[str, str] = field(default_factory=dict)  # newer checkpoints: {folder: what is wrong}
    data_id: str | None = None  # a hash of the data's tokens
    train_tokens: int | None = None  # in this run's part of the corpus; None when the data is not prepared
    sequences: int = 0  # per optimizer step, over all ranks
    micro_batch: int = 0  # sequences per forward pass on one rank
    accumulation: int = 0  # forward passes per step on each rank
    changed_now: str = ""  # by --change, since the checkpoint: "max_iters was 12, is 24"


def make_plan(settings: TrainSettings, explicit: frozenset[str], world: int) -> Plan:
    """Check a run's settings against each other, its data and the model it starts from.

    explicit: the keys that the user has set
    world: number of ranks

    Raises one UserError with every problem found. A dry run may lack its data.
    """
    plan, problems = Plan(world), settings_problems(settings)
    attempt = functools.partial(noting, problems)  # a UserError becomes one of `problems`, the result None

    # what the run folder and the data folder hold
    if not settings.dry_run:
        plan.resume_from, plan.damaged = attempt(find_resumable, settings) or (None, {})
    tokenizer = None  # of the data; without prepared data, assume the model's tokenizer
    if os.path.isdir(settings.dataset) or not settings.dry_run:
        tokenizer, plan.data_id, plan.train_tokens = attempt(read_data, settings) or (None, None, None)
    if plan.resume_from:
        wrong, plan.changed_now = same_run_problems(settings, plan.resume_from, plan.data_id)
        problems += wrong
    also = settings.also_validate
    if also and tokenizer and (os.path.isdir(also) or not settings.dry_run):
        attempt(check_also_validate, settings)

    # the model, and its teacher
    if settings.teacher:
        teacher_folder, plan.teacher = attempt(find_source, settings.teacher) or (None, None)
    if plan.resume_from:
        saved = attempt(open_config, plan.resume_from)
        plan.config = saved and dataclasses.replace(saved, dropout=settings.dropout)
    elif is_from_settings(settings, explicit):
        plan.config = new_config(settings, tokenizer or tokenizer_fields(plan.teacher or GPTConfig()))
    elif found := attempt(find_source, settings.init_from):
        folder, source = found
        wrong = inherited_problems(settings, explicit, source)
        problems += wrong
        plan.config = None if wrong else attempt(inherited_config, settings, explicit, source, tokenizer)
        if tokenizer:
            attempt(check_tokenizer, settings.dataset, folder, source)
    if plan.teacher and plan.config:
        # limit: the most it can read; block_size: what this run reads
        name, reads, window = settings.teacher, plan.teacher.limit, plan.config.block_size
        if reads < window:
            problems.append(f"teacher {name} reads {reads} tokens, the student {window}: too short")
        if tokenizer:
            attempt(check_tokenizer, settings.dataset, teacher_folder, plan.teacher)

    # the batch
    if plan.config:
        problems += recompute_problems(settings, plan.config)
        tokens, block_size = plan.train_tokens, plan.config.block_size
        if tokens is not None and tokens <= block_size:
            part = f"this run's part of {settings.dataset} has {tokens:,} tokens"
            problems.append(f"{part}, fewer than block_size + 1")
        split = attempt(split_batch, settings.batch_tokens, block_size, settings.batch_size, world)
        plan.sequences, plan.micro_batch, plan.accumulation = split or (0, 0, 0)
    raise_all(problems)
    return plan


# What can be wrong


def settings_problems(settings: TrainSettings) -> list[str]:
    """What is wrong with the settings by themselves, before model and data are known: one sentence each."""
    s, problems = settings, []
    if s.data_start >= s.data_end:
        problems.append(f"data_start {s.data_start} is not below data_end {s.data_end}")
    if s.min_lr > s.learning_rate:
        problems.append(f"min_lr {s.min_lr:g} is above learning_rate {s.learning_rate:g}: set both")
    if s.cooldown_iters is not None and s.schedule != "wsd":
        problems.append(f"cooldown_iters is of schedule=wsd, not {s.schedule}: leave one of them out")
    if s.change and s.resume == "never":
        problems.append("change is for a run that is continued: add --resume=auto, or leave it out")
    if s.max_hours is not None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        problems.append("torchrun --max-restarts would go on after max_hours: leave one of them out")
    if s.shard and s.optimizer == "muon":
        problems.append("optimizer=muon needs whole matrices and shard=True cuts them: choose one of the two")
    if s.init_from == "scratch" and s.inherit_layers is not None:
        problems.append("inherit_layers needs a model to inherit from: set init_from")
    if s.init_from == "scratch" and s.n_embd % s.n_head:
        problems.append(f"n_embd {s.n_embd} is not a multiple of n_head {s.n_head}")
    return problems


def same_run_problems(settings: TrainSettings, folder: str, data_id: str | None) -> tuple[list[str], str]:
    """([why the run that saved `folder` cannot be continued with these settings and data], what changed).

    A run that is continued must end as if it had never been interrupted. So all settings must be the same,
    except for HARMLESS ones. Those of the SCHEDULE may change if all steps so far keep their rates: a run
    with schedule=wsd can be made longer, or decayed earlier, until its decay begins. With settings.change
    they may change in any case, and the second value says how: "max_iters was 12, is 24", or "".
    """
    saved, defaults = checkpoint.read_state(folder), dataclasses.asdict(TrainSettings())
    # a setting that did not exist when the run began had its default
    was = {key: saved["settings"].get(key, default) for key, default in defaults.items()}
    now = dataclasses.asdict(settings)
    differ = {key: f"{key} was {was[key]!r}, is {now[key]!r}" for key in now if was[key] != now[key]}
    refused = [text for key, text in differ.items() if key not in HARMLESS | SCHEDULE]
    rates, accepted = [], []  # settings that give past steps other learning rates
    if not same_rates(TrainSettings(**was), settings, saved["step"]):
        rates = [text for key, text in differ.items() if key in SCHEDULE | {"max_iters"}]
    if settings.change:
        rates, accepted = [], rates

    problems, cure = [], "restore them, or use another out_dir"
    if refused or rates:
        other = f"cannot continue {settings.out_dir} with other settings ({'; '.join(refused + rates)})"
        flag = "" if refused else "add --change to go on with the new learning rates, "
        problems.append(f"{other}: {flag}{cure}")
    if data_id and saved.get("data") not in (None, data_id):
        other = f"{settings.dataset} holds other tokens than {settings.out_dir} was trained on"
        problems.append(f"{other}: {cure}")
    return problems, "; ".join(accepted)


def same_rates(before: TrainSettings, after: TrainSettings, steps: int) -> bool:
    """Whether the learning rates of the first `steps` steps are the same."""
    ends = [max(decay_end(settings), settings.warmup_iters) for settings in (before, after)]
    steps = min(steps, max(ends) + 1)  # from there on both rates are constant
    return all(learning_rate(step, before) == learning_rate(step, after) for step in range(steps))


def inherited_problems(settings: TrainSettings, explicit: frozenset, source: Config) -> list[str]:
    """Why settings and the model to start from do not fit: only depth and context may differ from it."""
    name, n_layer = settings.init_from, settings.inherit_layers or source.n_layer
    problems = []
    if n_layer > source.n_layer:
        problems.append(f"inherit_layers {n_layer} is more than the {source.n_layer} blocks of {name}")
    if "block_size" in explicit and settings.block_size > source.limit:
        problems.append(f"block_size {settings.block_size} is above the {source.limit} positions of {name}")
    has = dataclasses.asdict(source) | {"n_layer": n_layer}
    for key in ARCHITECTURE:
        asked = getattr(settings, key)
        if key in explicit and key != "block_size" and asked != has.get(key):
            problems.append(
                f"{key} {asked} was asked for, but the model from {name} has {has.get(key)}: leave it out"
            )
    return problems


def recompute_problems(settings: TrainSettings, config: Config) -> list[str]:
    """Why a model cannot recompute what checkpoint_activations asks for: not all models know "cheap"."""
    if settings.checkpoint_activations in config.recompute_choices:
        return []
    asked = f"checkpoint_activations={settings.checkpoint_activations}"
    return [f"{asked} is implemented for GPT-2 only: use {' or '.join(config.recompute_choices)}"]


def check_also_validate(settings: TrainSettings) -> None:
    """Raise UserError unless also_validate is a data folder with the dataset's tokenizer."""
    folders = settings.dataset, settings.also_validate
    ours, theirs = (read_meta(folder)["tokenizer"] for folder in folders)
    if any(ours.get(key) != theirs.get(key) for key in ("name", "n_vocab", "eot", "sha256")):
        raise UserError(f"{folders[1]} (also_validate) was not tokenised as {folders[0]}: prepare it alike")


# What is found


def find_resumable(settings: TrainSettings) -> tuple[str | None, dict[str, str]]:
    """(the newest whole checkpoint of out_dir, {a damaged one after it: why}); (None, {}) for a fresh run.

    Raises UserError when out_dir holds what `resume` does not allow.
    """
    out, steps = settings.out_dir, checkpoint.list_steps(settings.out_dir)
    if os.path.exists(os.path.join(out, "config.json")):
        raise UserError(f"{out} is a checkpoint, not a run folder: choose another --out_dir")
    if settings.resume == "never" and (steps or read_rows(os.path.join(out, "log.csv"))):
        cure = "continue it with --resume=auto, or choose another --out_dir"
        raise UserError(f"{out} already holds a run: {cure}")
    if settings.resume == "must" and not steps:
        cure = "--resume=auto would start afresh"
        raise UserError(f"{out} holds no checkpoint to continue (--resume=must); {cure}")
    damaged = {}
    for step in reversed(steps):
        folder = os.path.join(out, step)
        try:
            examine_checkpoint(folder)
            return folder, damaged
        except UserError as e:
            damaged[folder] = str(e)
    if damaged:
        why = next(iter(damaged.values()))
        raise UserError(f"{out} holds no whole checkpoint to continue ({why}): restore one, or delete {out}")
    return None, {}


def examine_checkpoint(folder: str) -> None:
    """Raise UserError unless a checkpoint's files, headers and shapes are fit to continue a run."""
    open_weights(folder, open_config(folder))
    checkpoint.check_resumable(folder)


def read_data(settings: TrainSettings) -> tuple[dict, str, int]:
    """(the config fields that name the tokenizer, a hash of the folder's tokens, the number of tokens in this
    run's part)."""
    theirs = read_meta(settings.dataset)["tokenizer"]
    tokenizer = {"tokenizer": theirs["name"], "n_vocab": theirs["n_vocab"], "eot": theirs["eot"]}
    length = len(Tokens(settings.dataset, "train"))
    tokens = int(length * settings.data_end) - int(length * settings.data_start)
    return tokenizer, identity(settings.dataset), tokens


def is_from_settings(settings: TrainSettings, explicit: frozenset) -> bool:
    """Whether the settings describe the model: for init_from=scratch; in a dry run also if init_from does not
    exist and n_head and n_embd are set."""
    name = settings.init_from
    missing = not (os.path.isdir(name) or name in RELEASED)
    return name == "scratch" or (settings.dry_run and missing and {"n_head", "n_embd"} <= explicit)


def new_config(settings: TrainSettings, tokenizer: dict) -> GPTConfig:
    """The config of the model that the settings describe."""
    sizes = {key: getattr(settings, key) for key in (*ARCHITECTURE, "dropout")}
    sizes["n_layer"] = settings.inherit_layers or settings.n_layer
    return GPTConfig(**sizes, vocab_size=pad_vocab(tokenizer["n_vocab"]), **tokenizer)


def find_source(name: str) -> tuple[str, Config]:
    """(folder with tokenizer, configuration) of a model to start from, before its weights are fetched.

    For a released GPT-2 nothing is fetched: the config is built in, and the name stands in for the folder.
    """
    if name == "resume":
        raise UserError("init_from = resume is nanoGPT's: write resume = auto, which continues out_dir")
    if name in RELEASED and not os.path.isdir(name):
        n_layer, n_head, n_embd = RELEASED[name]
        return name, GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    folder = checkpoint.find(name, weights=False)
    return folder, open_config(folder)


def inherited_config(settings, explicit, source: Config, tokenizer: dict | None) -> Config:
    """The config of a model that starts from one with the config `source`."""
    if settings.inherit_layers:
        source = source.with_blocks(list(range(settings.inherit_layers)))
    changes = {"dropout": settings.dropout}
    if "block_size" in explicit:
        changes["block_size"] = settings.block_size
    if not source.tokenizer and tokenizer:  # a model that names no tokenizer is taken to have the data's
        changes |= tokenizer
    return dataclasses.replace(source, **changes)


def tokenizer_fields(config: Config) -> dict:
    """The fields of a configuration that say what its tokenizer is."""
    return {key: getattr(config, key) for key in ("tokenizer", "n_vocab", "eot")}


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


# What --dry_run prints


def plan_text(plan: Plan, settings: TrainSettings) -> str:
    """The plan, its cost, and the time it takes on the GPUs that we know."""
    c, s = plan.config, settings
    total_tokens = s.max_iters * s.batch_tokens
    flops = flops_with_teacher(c, plan.teacher) * total_tokens
    blocks = f", its first {s.inherit_layers} blocks" if s.inherit_layers else ""
    data = f"not prepared: {c.n_vocab:,} ids are assumed"
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
    return "\n".join(lines + cost_lines(plan, settings, flops))


def cost_lines(plan: Plan, settings: TrainSettings, flops: float) -> list[str]:
    """Memory on one GPU, with DDP and in shards, and the time that each kind of GPU takes, line by line."""
    world = plan.world if plan.world > 1 else 8
    ways = {"one GPU": (1, 1), f"each of {world}": (world, 1)}  # (ranks of DDP, shards)
    if settings.optimizer != "muon":  # which needs whole matrices
        ways[f"each of {world} with shard=True"] = (1, world)
    lines, needs = ["memory       counted as a GPT-2's, without the allocator's overhead:"], []
    for where, (ranks, shards) in ways.items():
        way, sizes = dataclasses.replace(plan, world=ranks), (settings.batch_tokens, plan.config.block_size)
        if batch := noting([], split_batch, *sizes, settings.batch_size, ranks * shards):
            _, way.micro_batch, way.accumulation = batch  # else the batch does not divide: as planned
        terms = training_memory(way, settings, shards)
        if ranks > 1:  # in its second step DDP rebuilds its buckets; NCCL may still hold the first ones
            terms["first buckets (in DDP's second step)"] = 4 * plan.config.num_params
        needs.append(sum(terms.values()) / 1e9)
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in terms.items())
        lines += [f"             about {needs[-1]:.1f} GB on {where}:", f"               {parts}"]
    lines.append(f"time         at {ASSUMED_MFU:.0%} of the bf16 peak (an assumption), without validation:")
    alone, many = needs[0], needs[2 if settings.shard else 1]
    for name, (peak, gigabytes) in PEAKS.items():
        seconds, room = flops / (peak * 1e12 * ASSUMED_MFU), 0.9 * gigabytes
        needed = {1: alone, world: many}
        times = [duration(seconds / n) if need < room else "too large" for n, need in needed.items()]
        lines.append(f"  {name:22} {times[0]:>12} on 1, {times[1]:>12} on {world}")
    return lines


def duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves a number of at least 1: `5400` → `1.5 hours`."""
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    unit = next((unit for unit, size in units.items() if seconds >= size), "s")
    return f"{seconds / units.get(unit, 1):.1f} {unit}"
