"""Every setting of train.py, grow.py and replicate.py, and how it gets its value: default < config file < command line.

The calling form is nanoGPT's: `train.py [CONFIG.py] --key=value …`. A config file is Python to look at, but it is
read as data: assignments of literals and arithmetic on them. It is never executed.
"""

import argparse
import ast
import dataclasses
import math
import operator
import types
import typing
from dataclasses import dataclass
from typing import Literal

from inheritune.base.errors import Parser, UserError, nearest


def setting(default, help, low=None, high=None):
    """A dataclass field with its one-line doc and, for numbers, the range it must lie in (both ends included)."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class TrainSettings:
    """What one run of train.py does."""

    # where
    out_dir: str = setting("out", "run folder: checkpoints, log.csv, timing.csv")
    dataset: str = setting("data/openwebtext", "data folder with train and val bins")
    data_start: float = setting(0.0, "fraction of the training stream where this run's part begins", 0.0, 1.0)
    data_end: float = setting(1.0, "fraction of the training stream where this run's part ends", 0.0, 1.0)
    # what
    init_from: str = setting("scratch", "scratch, or a checkpoint folder, run folder or Hugging Face id to start from")
    inherit_layers: int | None = setting(None, "keep only the first this many blocks of init_from (default: all)", 1)
    n_layer: int = setting(12, "transformer blocks", 1, 1000)
    n_head: int = setting(12, "attention heads", 1)
    n_embd: int = setting(768, "width C", 1)
    block_size: int = setting(1024, "context length T in tokens", 1)
    bias: bool = setting(False, "biases in linear layers and LayerNorms")
    dropout: float = setting(0.0, "dropout probability", 0.0, 0.999)
    scale_attn_by_inverse_layer_idx: bool = setting(False, "divide attention logits by (block number + 1)")
    # how long, how much
    batch_tokens: int = setting(491_520, "tokens per optimizer step, whatever the number of ranks", 1)
    batch_size: int = setting(12, "upper limit of sequences per micro-batch on one rank", 1)
    max_iters: int = setting(100_000, "optimizer steps", 1)
    stop_at_val_loss: float | None = setting(None, "stop as soon as validation loss (nats/token) reaches this")
    # distillation
    teacher: str = setting("", "checkpoint, run folder or Hugging Face id to distil from (default: no distillation)")
    kd_alpha: float = setting(0.6, "loss = kd_alpha CE + (1 - kd_alpha) T^2 KL(teacher to student)", 0.0, 1.0)
    kd_temperature: float = setting(1.0, "T, by which both sides' logits are divided in KL", 0.01)
    # optimisation
    optimizer: Literal["adamw", "muon"] = setting("adamw", "muon: the blocks' matrices by Muon, the rest by AdamW")
    learning_rate: float = setting(6e-4, "peak learning rate", 0.0)
    min_lr: float = setting(6e-5, "learning rate from lr_decay_iters on", 0.0)
    warmup_iters: int = setting(2000, "steps of linear warm-up", 0)
    lr_decay_iters: int | None = setting(None, "step at which the cosine reaches min_lr (default: max_iters)", 0)
    weight_decay: float = setting(0.1, "decay of the blocks' matrices; embeddings and norms have none", 0.0)
    beta1: float = setting(0.9, "AdamW beta1", 0.0, 0.9999999)
    beta2: float = setting(0.95, "AdamW beta2", 0.0, 0.9999999)
    grad_clip: float = setting(1.0, "clip the gradient's norm to this; 0 does not clip", 0.0)
    # looking and saving
    eval_interval: int = setting(1000, "steps between validations", 1)
    eval_tokens: int = setting(4_000_000, "validate on this many tokens of val, or all if it has fewer", 1)
    log_interval: int = setting(10, "steps between printed and logged lines", 1)
    log_to: Literal["none", "tensorboard", "wandb"] = setting("none", "also send the log there (requirements-log.txt)")
    save_interval: int | None = setting(None, "steps between checkpoints (default: eval_interval)", 1)
    keep_last: int = setting(2, "checkpoints kept besides the best", 1)
    resume: Literal["never", "auto", "must"] = setting(
        "never",
        "continue the run in out_dir: never refuses one that is there, auto if there is one, must or fail",
    )
    verify: bool = setting(False, "check the sha256 of the checkpoint and the data that this run starts from")
    # machine
    seed: int = setting(1337, "seeds the initialisation, the data order and dropout", 0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "autocast type; auto is bfloat16 on a GPU that has it, else float32"
    )
    compile: bool | None = setting(None, "torch.compile the model (default: on CUDA only)")
    checkpoint_activations: bool = setting(False, "keep less for backward and compute it again: less memory, more time")
    shard: bool = setting(False, "FSDP2 in place of DDP: ranks share weights, gradients and moments")
    threads: int | None = setting(None, "CPU threads per process; bits depend on it (default: torch's choice)", 1)
    dry_run: bool = setting(False, "print what would happen, and stop: needs no data, hub or GPU")


@dataclass
class GrowSettings:
    """What grow.py does around train.py: the Inheritune recipe (paper, Algorithm 1)."""

    reference: str = setting("", "reference: checkpoint, run folder or Hugging Face id (default: out_dir/reference)")
    reference_config: str = setting("", "train.py config that trains the reference into its run folder if need be")
    k_start: int | None = setting(None, "blocks inherited in the first round (default: half of the reference's)", 1)
    k_step: int = setting(2, "blocks added from round to round", 1)
    growth: Literal["reinherit", "onto"] = setting(
        "reinherit",
        "a further round takes all blocks from the reference, or adds its next ones onto the trained model",
    )
    control: bool = setting(True, "also train random-init controls: equal steps, and equal compute of the pipeline")


@dataclass
class ReplicateSettings:
    """What replicate.py does around train.py: arms × seeds, compared (arms.py lists the arms)."""

    results: str = setting("results/replicate", "folder for results.csv, table.md, curves.png and rank.png")
    reference: str = setting("", "reference: checkpoint, run folder or Hugging Face id (default: one for each seed)")
    reference_config: str = setting("", "train.py config that trains each seed's reference")
    arms: str = setting("all:1", "which arms, each with its number of seeds, e.g. 'all:1 random:3'; later ones count")
    first_seed: int = setting(1, "seeds count up from this one", 0)
    layers: int | None = setting(None, "blocks of the small models (default: half of the reference's)", 1)
    rounds_from: int | None = setting(None, "first round of the arms that grow (default: layers - rounds_step)", 1)
    rounds_step: int = setting(2, "blocks added from round to round in the arms that grow", 1)
    seen: float = setting(1.0, "fraction of the training stream that all arms but `unseen` train on", 0.01, 1.0)
    final_tokens: int | None = setting(None, "measure final losses on this many tokens (default: eval_tokens)", 1)
    jobs: int | None = setting(None, "arms trained side by side (default: cores / threads; 1 on GPUs)", 1)


# What may change when a run is continued: it alters neither the mathematics nor what the log's rows mean.
HARMLESS = frozenset(
    {"out_dir", "batch_size", "stop_at_val_loss", "max_iters", "eval_interval", "log_interval", "log_to"}
    | {"save_interval", "keep_last", "resume", "verify", "device", "compile", "checkpoint_activations", "shard"}
    | {"threads", "dry_run"}
)

# What says where and how a run is made, and nothing of what comes out: not part of an arm's identity (replicate.py).
MACHINE = frozenset(
    {"out_dir", "batch_size", "log_interval", "log_to", "save_interval", "keep_last", "resume", "verify", "device"}
    | {"compile", "checkpoint_activations", "shard", "threads", "dry_run"}
)

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(node):
    """The value of a literal, or of + - * / // % and unary minus on numbers. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bool, int, float, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -number(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](number(node.left), number(node.right))
    raise ValueError("is not a literal or arithmetic on numbers")


def number(node):
    """`evaluate`, for an operand: only numbers of a sane size take part in arithmetic."""
    value = evaluate(node)
    if type(value) not in (int, float) or abs(value) > 1e300:
        raise ValueError("does arithmetic on something that is not a number of sane size")
    return value


def read_config_file(path):
    """{key: (value, line number)} of a config file. Raises UserError naming file and line."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read(1_000_000))
    except FileNotFoundError:
        raise UserError(f"no config file {path!r}") from None
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno}: {e.msg}; a config file holds lines like max_iters = 1000") from None
    except (UnicodeDecodeError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{path} is not a text file of key = value lines") from None
    values = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(target, ast.Name):
            raise UserError(f"{path}:{node.lineno}: only lines like max_iters = 1000 are allowed (never executed)")
        try:
            values[target.id] = (evaluate(node.value), node.lineno)
        except (ValueError, ArithmeticError, RecursionError) as e:
            raise UserError(f"{path}:{node.lineno}: the value of {target.id} {e}") from None
    return values


def kind(field):
    """(base type or choices, may it be None) of a dataclass field."""
    hint = field.type
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def convert(field, value):
    """`value`, from a config file or the command line, as the field's type. Raises ValueError saying what is wanted."""
    base, optional = kind(field)
    text = isinstance(value, str)
    if optional and (value is None or (text and value.lower() in ("none", "auto"))):
        return None
    if typing.get_origin(base) is Literal:
        choices = typing.get_args(base)
        if value in choices:
            return value
        raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}")
    if base is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if isinstance(value, bool) or (text and value.lower() in known):
            return value if isinstance(value, bool) else known[value.lower()]
    elif base is str and text:
        return value
    elif base in (int, float) and (text or (type(value) in (int, float) and isinstance(value, (base, int)))):
        try:
            converted = base(value)
            float(converted)  # an int may be too large for that, and then for every use here
        except (ValueError, OverflowError):
            converted = math.nan
        low, high = field.metadata["low"], field.metadata["high"]
        if math.isfinite(converted):
            if (low is not None and converted < low) or (high is not None and converted > high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"must be {bounds}, not {value}")
            return converted
    name = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}[base]
    raise ValueError(f"must be {name}, not {value!r}")


def parse(classes, argv, description, others=None):
    """Read a command line into one instance of each dataclass of `classes`, and the set of keys that were given.

    `others`: {script: dataclass} whose keys belong to another script; a key of those is refused by naming the script.
    All problems are raised together, in one UserError.
    """
    fields = {f.name: f for c in classes for f in dataclasses.fields(c)}
    parser = Parser(description=description, formatter_class=argparse.HelpFormatter)
    parser.add_argument("config", nargs="?", help="config file of key = value lines, read as data")
    for f in fields.values():
        base, _ = kind(f)
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))  # both spellings, once each
        default = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(
            *names,
            dest=f.name,
            metavar="|".join(typing.get_args(base)) if typing.get_origin(base) is Literal else base.__name__,
            nargs="?" if base is bool else None,
            const="True" if base is bool else None,
            default=None,
            help=f.metadata["help"].replace("%", "%%") + default,
        )
    arguments = vars(parser.parse_args(argv))
    config = arguments.pop("config")

    problems, values = [], {}
    for key, (value, line) in (read_config_file(config) if config else {}).items():
        if key in fields:
            values[key] = (value, f"{config}:{line}: {key}")
        else:
            scripts = [s for s, c in (others or {}).items() if key in c.__dataclass_fields__]
            hint = f" but one of {' or '.join(scripts)}: run that with this file" if scripts else nearest(key, fields)
            problems.append(f"{config}:{line}: {key} is not a setting{hint}")
    values.update({key: (text, f"--{key}") for key, text in arguments.items() if text is not None})
    given = {}
    for key, (value, place) in values.items():
        try:
            given[key] = convert(fields[key], value)
        except ValueError as e:
            problems.append(f"{place} {e}")
    raise_all(problems)
    made = [c(**{k: v for k, v in given.items() if k in c.__dataclass_fields__}) for c in classes]
    return *made, frozenset(given)


def raise_all(problems):
    """Raise one UserError for a list of problems, if there are any."""
    if problems:
        head = f"{len(problems)} problems:\n  " if len(problems) > 1 else ""
        raise UserError(head + "\n  ".join(problems))
