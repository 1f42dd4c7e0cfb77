"""What a run reports: log.csv and timing.csv, TensorBoard or W&B, and a printed line."""

import csv
import dataclasses
import io
import os
import secrets
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import replacing, unlock_folder
from inheritune.training.device import peak_flops, peak_memory_mb
from inheritune.training.settings import TrainSettings

# frozen: log columns and number format. A column may be added: older logs leave it empty.
LOG_COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm")  # reproducible to the last digit
TERMS = ("ce", "kl")  # further columns with a teacher: the terms of the loss, unweighted
ALSO = "also_val_loss"  # a further column with also_validate
TIMING_COLUMNS = ("step", "tokens_per_s", "mfu", "memory_mb", "train_s", "val_s")


def show(value: float | None) -> str:
    """The text of a number in a log, "" for None. Nine significant digits tell any two fp32 apart."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


class Recorder:
    """Reports a run's steps. Only rank 0 opens its recorder; those of the other ranks do nothing.

    Speeds are those since the last line. They leave out the first step of a process, which compiles.
    """

    def __init__(self, settings: TrainSettings, flops_per_token: float, device: torch.device, world: int):
        self.settings, self.device = settings, device
        peak = peak_flops(device)  # None where it is not known
        self.peak = peak and peak * world / flops_per_token  # tokens/s
        self.lock = None
        self.train_s = self.val_s = self.last_val_s = 0.0  # seconds in this process; saving does not count
        self.since = None  # (step, train_s) after the first step, then at the last line

    def open(self, lock: int, step: int) -> None:
        """Open the logs of the run folder that `lock` locks, for the rows from `step` on."""
        out, names = self.settings.out_dir, LOG_COLUMNS + (TERMS if self.settings.teacher else ())
        had = any(ALSO in row for row in read_rows(os.path.join(out, "log.csv"))[:1])  # already there
        names += (ALSO,) if self.settings.also_validate or had else ()
        self.log = CsvLog(os.path.join(out, "log.csv"), names, before=step)
        self.timing = CsvLog(os.path.join(out, "timing.csv"), TIMING_COLUMNS, before=step)
        self.sink = open_sink(self.settings, step)
        self.lock = lock

    def close(self) -> None:
        """Release the run folder."""
        if self.lock is not None:
            unlock_folder(self.settings.out_dir, self.lock)

    def stepped(self, step: int, seconds: float) -> None:
        """Count the time of the step that led to `step`."""
        self.train_s += seconds
        self.since = self.since or (step, self.train_s)

    def validated(self, seconds: float) -> None:
        """Count the time of a validation."""
        self.val_s += seconds
        self.last_val_s = seconds

    def report(self, step: int, row: dict, val_losses: dict[str, float]) -> None:
        """Print and log the step that led to `step`, if a line is due or the model was validated there.

        row: loss, lr, grad_norm, … of that step.
        val_losses: {column: loss}, {} when the model was not validated.
        """
        s = self.settings
        if self.lock is None or (step % s.log_interval and not val_losses):
            return
        row = {"step": step, "tokens": step * s.batch_tokens, **row, **val_losses}
        self.log.write(row)

        # speed since the last line
        before, began = self.since or (step, 0.0)
        step_s = (self.train_s - began) / (step - before) if step > before else None
        tokens_per_s = s.batch_tokens / step_s if step_s else None  # over all ranks
        mfu = tokens_per_s / self.peak if step_s and self.peak else None  # model FLOPs utilisation
        if self.since:
            self.since = step, self.train_s
        times = {"tokens_per_s": tokens_per_s, "mfu": mfu, "memory_mb": peak_memory_mb(self.device)}
        times |= {"train_s": self.train_s, "val_s": self.val_s}
        self.timing.write({"step": step} | times)
        self.sink(step, {k: v for k, v in (row | times).items() if v is not None})

        # the printed line
        parts = [f"step {step}/{s.max_iters}"]
        if "loss" in row:
            parts += [f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.2f}"]
        parts += [f"{name.removesuffix('_loss')} {loss:.4f}" for name, loss in val_losses.items()]
        parts.append(f"{row['tokens']:,} tokens")
        if step_s:  # the time left: steps at the present speed, validations as long as the last
            validations = -(-s.max_iters // s.eval_interval) - step // s.eval_interval
            left = (s.max_iters - step) * step_s + validations * self.last_val_s
            shown = f"mfu {mfu:.1%}" if mfu else "mfu n/a"
            parts += [f"{tokens_per_s:,.0f} tok/s", shown, f"eta {timedelta(seconds=round(left))}"]
        print(" | ".join(parts), flush=True)


class CsvLog:
    """A CSV file with one row per step, appended to as the run goes.

    Opening an existing file keeps its rows of steps before `before`. It drops a line that a kill cut short,
    and later rows, which the run writes again. Columns that the file lacks are empty in its old rows. Raises
    UserError when the file has columns that are not in `columns`.
    """

    def __init__(self, path: str, columns: tuple, before: int = 0):
        self.path, self.columns = path, columns
        rows = read_rows(path)
        if rows and not set(columns) >= rows[0].keys() >= {"step"}:
            has = f"{path} has columns {list(rows[0])}, not {list(columns)}"
            raise UserError(f"{has}; it is not this run's log")
        rows = [row for row in rows if int(row["step"]) < before]
        texts = [columns, *([row.get(name, "") for name in columns] for row in rows)]
        with replacing(path, "w") as f:
            f.writelines(",".join(values) + "\n" for values in texts)

    def write(self, row: dict) -> None:
        """Append a row {column: number or None}."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(",".join(show(row.get(k)) for k in self.columns) + "\n")


def read_rows(path: str) -> list[dict[str, str]]:
    """The whole rows of a CSV log as [{column: text}], [] when there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read()
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [row for row in reader if None not in row and None not in row.values()]


def loss_curve(run: str) -> tuple[list[float], list[float]]:
    """(tokens, validation losses in nats/token) of a run folder's log.csv."""
    rows = [r for r in read_rows(os.path.join(run, "log.csv")) if r["val_loss"]]
    return [float(r["tokens"]) for r in rows], [float(r["val_loss"]) for r in rows]


def open_sink(settings: TrainSettings, step: int) -> Callable[[int, dict[str, float]], Any]:
    """A function write(step, {name: number}) that feeds TensorBoard or W&B, or does nothing (log_to=none).

    step: the first one that it will get

    Raises UserError when the package is missing, or W&B cannot be reached.
    """
    kind, out_dir = settings.log_to, settings.out_dir
    if kind == "none":
        return lambda step, values: None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            import wandb
    except ImportError:
        raise UserError(f"--log_to={kind} needs a package: pip install -r requirements-extra.txt") from None
    if kind == "tensorboard":
        # purge_step hides what a killed run wrote from `step` on, which is written again now
        writer = SummaryWriter(os.path.join(out_dir, "tensorboard"), purge_step=step)

        def write(step, values):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return write

    # the run folder keeps W&B's id of the run, so that a resumed run goes on in the same curves
    path = os.path.join(out_dir, "wandb_id")
    if not os.path.exists(path):
        with replacing(path, "w") as f:
            f.write(secrets.token_hex(4))
    with open(path, encoding="utf-8") as f:
        names = {"id": f.read().strip()}
    # arguments of wandb.init win over WANDB_PROJECT and WANDB_NAME, so both are read here
    names["project"] = os.environ.get("WANDB_PROJECT") or "nanoInheritune"
    names["name"] = os.environ.get("WANDB_NAME") or os.path.basename(out_dir)
    try:
        run = wandb.init(**names, resume="allow", config=dataclasses.asdict(settings), dir=out_dir)
    except wandb.Error as e:
        fix = "run `wandb login`, set WANDB_MODE=offline, or leave it out"
        raise UserError(f"--log_to=wandb: W&B says: {str(e).strip().splitlines()[0]}; {fix}") from None
    return lambda step, values: run.log(values, step=step)
