"""Reads settings from a config file and a command line: default < config file < command line.

The calling form is nanoGPT's: `train.py [CONFIG.py] --key=value …`. A config file looks like Python but is
data: assignments of literals and arithmetic on numbers. It is never executed.
"""

import argparse
import ast
import dataclasses
import math
import operator
import types
import typing
from typing import Any, Literal

from inheritune.base.errors import Parser, UserError, expand_home, nearest, raise_all
from inheritune.training.settings import GrowSettings, ReplicateSettings

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}

# nanoGPT's settings that do not exist here, and what to write instead
NANOGPT = {
    "gradient_accumulation_steps": "write batch_tokens = this times batch_size times block_size",
    "eval_iters": "write eval_tokens: each validation reads the same first tokens of val",
    "eval_only": "leave it out, and run score.py on the checkpoint",
    "always_save_checkpoint": "write save_interval; the best checkpoint is kept in any case",
    "decay_lr": "leave it out; for a constant rate set min_lr to learning_rate",
    "backend": "leave it out: it is NCCL on GPUs and gloo elsewhere",
    "wandb_log": "write log_to = 'wandb'",
    "wandb_project": "set WANDB_PROJECT in the environment (default: nanoInheritune)",
    "wandb_run_name": "set WANDB_NAME in the environment (default: the name of out_dir)",
}


def parse(classes: tuple, argv: list[str] | None, description: str) -> tuple:
    """(an instance of each dataclass in `classes`, …, the frozenset of keys that were set explicitly).

    classes: dataclasses of settings.py
    argv: the command line without the script's name; None: that of this process
    description: what --help begins with

    Raises one UserError with all problems.
    """
    fields = {f.name: f for c in classes for f in dataclasses.fields(c)}
    typed = vars(make_parser(fields, description).parse_args(argv))
    config = typed.pop("config")
    lines = read_config_file(config) if config else {}
    found = {key: (f"{config}:{line}: {key}", str(value)) for key, (value, line) in lines.items()}
    found |= {key: (f"--{key}", text) for key, text in typed.items()}

    explicit, problems = {}, []
    for key, (where, text) in found.items():
        try:
            if key not in fields:
                raise ValueError(f"is not a setting{hint(key, fields)}")
            explicit[key] = convert(fields[key], text)
        except ValueError as e:
            problems.append(f"{where} {e}")
    raise_all(problems)
    made = [c(**{k: v for k, v in explicit.items() if k in c.__dataclass_fields__}) for c in classes]
    return *made, frozenset(explicit)


def make_parser(fields: dict, description: str) -> Parser:
    """The parser of these dataclass fields, each flag spelled with _ or -. Flags that are left out are not in
    its result, so that a config file can set them."""
    # argparse's own formatter: the help texts below already say the defaults
    options = {"formatter_class": argparse.HelpFormatter, "argument_default": argparse.SUPPRESS}
    parser = Parser(description=description, instead=NANOGPT, **options)
    parser.add_argument(
        "config", nargs="?", default=None, help="config file of key = value lines, read as data"
    )
    groups = {}
    for f in fields.values():
        heading = f.metadata["heading"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        base, *_ = kinds(f)
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))  # both spellings, once each
        options = {"nargs": "?", "const": "True"} if base is bool else {}
        options["metavar"] = "|".join(typing.get_args(base)) or base.__name__
        default = "" if f.default in (None, "") else f" (default: {f.default})"
        text = f.metadata["help"].replace("%", "%%") + default
        groups[heading].add_argument(*names, dest=f.name, help=text, **options)
    return parser


def kinds(field: dataclasses.Field) -> tuple:
    """The types of a dataclass field: `int | None` → (int, NoneType), `bool` → (bool,)."""
    return typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)


def convert(field: dataclasses.Field, text: str) -> Any:
    """The value of a setting's text. Raises ValueError that says what it must be."""
    base, *none = kinds(field)
    if none and text.lower() in ("none", "auto"):
        return None
    if base is str:
        return field.default if text == "None" else expand_home(text)  # teacher = None in a config file
    if typing.get_origin(base) is Literal:
        if text not in typing.get_args(base):
            raise ValueError(f"must be one of {', '.join(typing.get_args(base))}, not {text!r}")
        return text
    if base is bool:
        if text.lower() not in ("true", "1", "false", "0"):
            raise ValueError(f"must be True or False, not {text!r}")
        return text.lower() in ("true", "1")

    # numbers
    try:
        value = base(text)
        usable = math.isfinite(value)  # raises for a whole number beyond every float
    except (ValueError, OverflowError):
        usable = False
    if not usable:
        raise ValueError(f"must be {'a whole number' if base is int else 'a number'}, not {text!r}")
    low, high = field.metadata["low"], field.metadata["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(
            f"must be {f'at least {low}' if high is None else f'between {low} and {high}'}, not {text}"
        )
    return value


def hint(key: str, fields: dict) -> str:
    """What the unknown `key` may be: another script's setting, nanoGPT's, or a misspelled one of `fields`."""
    others = {"grow.py": GrowSettings, "replicate.py": ReplicateSettings}
    scripts = [script for script, c in others.items() if key in c.__dataclass_fields__]
    if scripts:
        return f" but one of {' or '.join(scripts)}: run that with this file"
    return f" but nanoGPT's: {NANOGPT[key]}" if key in NANOGPT else nearest(key, fields)


def read_config_file(path: str) -> dict[str, tuple[Any, int]]:
    """{key: (value, line number)} of a config file. Errors name file and line."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            tree = ast.parse(f.read(1_000_000))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        where = path if path.isprintable() else repr(path)
        where += f":{e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
        raise UserError(f"{where}: not a config file, which holds lines like max_iters = 1000") from None
    values = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(target, ast.Name):
            raise UserError(
                f"{path}:{node.lineno}: only lines like max_iters = 1000 are allowed (never executed)"
            )
        try:
            values[target.id] = (evaluate(node.value), node.lineno)
        except (ValueError, ArithmeticError, RecursionError) as e:
            raise UserError(f"{path}:{node.lineno}: the value of {target.id} {e}") from None
    return values


def evaluate(node: ast.expr) -> Any:
    """The value of a literal, or of + - * / // % and unary minus on numbers; ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool | int | float | None):
        return node.value
    if not isinstance(node, ast.UnaryOp | ast.BinOp) or type(node.op) not in ARITHMETIC:
        raise ValueError("is not a literal, or + - * / // % on numbers")
    numbers = [
        evaluate(n) for n in ([node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right])
    ]
    if any(type(n) not in (int, float) or abs(n) > 1e300 for n in numbers):
        raise ValueError("does arithmetic on something that is not a number of sane size")
    return ARITHMETIC[type(node.op)](*numbers)
