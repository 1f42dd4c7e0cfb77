"""What a run writes down as it goes: CSV files that a figure can be drawn from, and optionally TensorBoard or W&B."""

import csv
import io
import os

from inheritune.base.errors import UserError
from inheritune.base.files import replacing


class CsvLog:
    """A CSV file with one row per step, appended to as the run goes.

    Opening an existing file keeps its rows up to `last_step` and drops the rest, and a line that a kill cut short:
    the run will write them again. Raises UserError when the file has other columns.
    """

    def __init__(self, path, columns, last_step=-1):
        self.path, self.columns = path, columns
        self.rows = [r for r in read_rows(path, columns) if int(r["step"]) <= last_step]
        with replacing(path, "w") as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def write(self, row):
        """Append a row {column: number or None}; floats keep nine significant digits, enough for any fp32."""
        text = {k: show(row.get(k)) for k in self.columns}
        line = io.StringIO()
        csv.DictWriter(line, self.columns, lineterminator="\n").writerow(text)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(line.getvalue())
        self.rows.append(text)

    def last(self):
        """The newest row as {column: float or None}, or None when there is none."""
        return {k: float(v) if v else None for k, v in self.rows[-1].items()} if self.rows else None


def show(value):
    """A log's text for a number or None."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def read_rows(path, columns=None):
    """The whole rows of a CSV log as [{column: text}], [] when there is no file. Raises UserError."""
    if not os.path.lexists(path):
        return []
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{path} is no regular file")
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read()
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = [r for r in reader if None not in r and None not in r.values()]
    if columns is not None and text and reader.fieldnames != list(columns):
        raise UserError(f"{path} has columns {reader.fieldnames}, not {list(columns)}; it is not this run's log")
    return rows


def open_sink(kind, out_dir, settings):
    """A function write(step, {name: number}) that feeds TensorBoard or W&B, or does nothing for "none".

    Raises UserError when the package is missing.
    """
    if kind == "none":
        return lambda step, values: None
    try:
        if kind == "tensorboard":  # needs an extra package
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(os.path.join(out_dir, "tensorboard"))

            def write(step, values):
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            return write
        import wandb

        name = os.path.basename(out_dir)  # needs an extra package
        run = wandb.init(project="nanoInheritune", name=name, config=settings, dir=out_dir)  # needs an extra package
        return lambda step, values: run.log(values, step=step)  # needs an extra package
    except ImportError:
        raise UserError(f"--log_to={kind} needs a package: pip install -r requirements-log.txt") from None
