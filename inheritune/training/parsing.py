"""Reads settings from a config file and a command line: default < config file < command line.

The calling form is nanoGPT's: `train.py [CONFIG.py] --key=value …`. A config file looks like Python but is
data: assignments of literals and arithmetic on numbers. It is never executed; its lines become flags.
"""

import argparse
import ast
import dataclasses
import functools
import math
import operator
import os
import types
import typing
from typing import Any, Literal

from inheritune.base.errors import Parser, UserError, nearest, raise_all

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

# nanoGPT's settings that have no namesake here, and what to write instead
NANOGPT = {
    "gradient_accumulation_steps": "write batch_tokens = this times batch_size times block_size",
    "eval_iters": "write eval_tokens: each validation reads the same first tokens of val",
    "eval_only": "leave it out, and run score.py on the checkpoint",
    "always_save_checkpoint": "write save_interval; the best checkpoint is kept in any case",
    "decay_lr": "leave it out; for a constant rate write min_lr equal to learning_rate",
    "backend": "leave it out: it is NCCL on GPUs and gloo elsewhere",
    "wandb_log": "write log_to = 'wandb'",
    "wandb_project": "leave it out: the project is called nanoInheritune",
    "wandb_run_name": "leave it out: the run is called like its out_dir",
}


class Wrong(str):
    """What a setting must be, in place of its value."""


def parse(classes: tuple, argv: list[str] | None, description: str, others: dict | None = None) -> tuple:
    """Read a command line into one instance of each dataclass of `classes`, and the set of keys given.

    others: {script: dataclass} of settings that belong to another script: a key of those is refused by naming
    the script. All problems are raised together, in one UserError.
    """
    fields = {f.name: f for c in classes for f in dataclasses.fields(c)}
    parser = make_parser(fields, description)
    typed = vars(parser.parse_args(argv))
    config = typed.pop("config")

    # the config file's lines as flags, which those of the command line override
    lines = read_config_file(config) if config else {}
    problems = [
        f"{config}:{line}: {key} is not a setting{hint(key, fields, others or {})}"
        for key, (_, line) in lines.items()
        if key not in fields
    ]
    flags = [f"--{key}={value}" for key, (value, _) in lines.items() if key in fields]
    given = {k: v for k, v in (vars(parser.parse_args(flags)) | typed).items() if k in fields}
    for key, value in given.items():
        if isinstance(value, Wrong):
            problems.append(f"{f'--{key}' if key in typed else f'{config}:{lines[key][1]}: {key}'} {value}")
    raise_all(problems)
    made = [c(**{k: v for k, v in given.items() if k in c.__dataclass_fields__}) for c in classes]
    return *made, frozenset(given)


def make_parser(fields: dict, description: str) -> Parser:
    """The parser of these dataclass fields, each flag spelled with _ or -; what is not given is left out."""
    parser = Parser(
        description=description,
        formatter_class=argparse.HelpFormatter,
        argument_default=argparse.SUPPRESS,
        instead=NANOGPT,
    )
    parser.add_argument(
        "config", nargs="?", default=None, help="config file of key = value lines, read as data"
    )
    for f in fields.values():
        base, _ = kind(f)
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))  # both spellings, once each
        default = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(
            *names,
            dest=f.name,
            type=functools.partial(convert, f),
            metavar="|".join(typing.get_args(base)) or base.__name__,
            nargs="?" if base is bool else None,
            const="True" if base is bool else None,
            help=f.metadata["help"].replace("%", "%%") + default,
        )
    return parser


def kind(field: dataclasses.Field) -> tuple[Any, bool]:
    """(base type or choices, may it be None) of a dataclass field."""
    if isinstance(field.type, types.UnionType):
        return next(t for t in typing.get_args(field.type) if t is not type(None)), True
    return field.type, False


def convert(field: dataclasses.Field, text: str) -> Any:
    """The value of a flag's text, or a Wrong that says what it must be."""
    base, optional = kind(field)
    if optional and text.lower() in ("none", "auto"):
        return None
    if typing.get_origin(base) is Literal:
        choices = typing.get_args(base)
        return text if text in choices else Wrong(f"must be one of {', '.join(choices)}, not {text!r}")
    if base is str:
        return os.path.expanduser(text) if field.metadata["path"] else text
    if base is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        return known.get(text.lower(), Wrong(f"must be True or False, not {text!r}"))

    # numbers
    try:
        value = base(text)
        usable = math.isfinite(value)  # raises for a whole number beyond every float
    except (ValueError, OverflowError):
        usable = False
    if not usable:
        return Wrong(f"must be {'a whole number' if base is int else 'a number'}, not {text!r}")
    low, high = field.metadata["low"], field.metadata["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        return Wrong(f"must be {bounds}, not {text}")
    return value


def hint(key: str, fields: dict, others: dict) -> str:
    """What else `key` may be: another script's setting, nanoGPT's, or a misspelled one of `fields`."""
    scripts = [script for script, c in others.items() if key in c.__dataclass_fields__]
    if scripts:
        return f" but one of {' or '.join(scripts)}: run that with this file"
    return f" but nanoGPT's: {NANOGPT[key]}" if key in NANOGPT else nearest(key, fields)


def read_config_file(path: str) -> dict[str, tuple[Any, int]]:
    """{key: (value, line number)} of a config file. Errors name file and line."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            tree = ast.parse(f.read(1_000_000))
    except FileNotFoundError:
        raise UserError(f"no config file {path!r}") from None
    except SyntaxError as e:
        raise UserError(
            f"{path}:{e.lineno}: {e.msg}; a config file holds lines like max_iters = 1000"
        ) from None
    except (UnicodeDecodeError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{path} is not a text file of key = value lines") from None
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
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bool, int, float, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -number(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](number(node.left), number(node.right))
    raise ValueError("is not a literal or arithmetic on numbers")


def number(node: ast.expr) -> int | float:
    """`evaluate`, for an operand: only numbers up to 1e300 take part in arithmetic."""
    value = evaluate(node)
    if type(value) not in (int, float) or abs(value) > 1e300:
        raise ValueError("does arithmetic on something that is not a number of sane size")
    return value
