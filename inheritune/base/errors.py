"""How commands report errors: one line on stderr for each problem, with its cure, and a non-zero exit status.

Whatever a user can get wrong raises `UserError`. `one_line` wraps each command's `main` and prints the lines.
It also catches OSError (a full disk, a missing permission), Ctrl-C and the signals that ask a process to end.
Bugs keep their traceback.
"""

import argparse
import difflib
import errno
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

# a scheduler's end (SIGTERM), its warnings before that (Slurm's SIGUSR1 and 2), a closed terminal (SIGHUP)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
CURES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space")
CURES[errno.EFBIG] = "raise the limit (ulimit -f)"


class UserError(Exception):
    """A mistake the user can fix. The message is printed unchanged, so it says what to do."""


class Stopped(BaseException):
    """A signal asked this process to end, and everything worth keeping is saved."""

    def __init__(self, number: int, message: str = "interrupted; run the same command again to go on"):
        super().__init__(message)
        self.signal = number


def one_line(main: Callable | None = None, *, ranks: bool = False) -> Callable:
    """Decorates a command's `main(argv=None)`: errors end it with one line on stderr instead of a traceback.

    ranks: torchrun may start the command (`@one_line(ranks=True)`) in several processes; only rank 0
        prints the line.

    Exit status: 1 after a UserError or OSError, 128 + the signal's number after SIGINT or a stop signal.
    """
    if main is None:
        return functools.partial(one_line, ranks=ranks)

    def stop(number, _frame):
        raise Stopped(number)

    @functools.wraps(main)
    def wrapped(argv=None):
        name = os.path.basename(main.__globals__["__file__"])
        first = True
        stdout, stderr = redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr))
        with stdout, stderr, signals_handled(STOP_SIGNALS, stop):
            try:
                first = not ranks or rank_info()[0] == 0
                result = main(argv)
                sys.stdout.flush()
                return result
            except Exception as e:
                if not is_one_line(e):
                    raise
                message = f"{name}: {error_line(e)}"
            except (KeyboardInterrupt, Stopped) as e:
                stopped = e if isinstance(e, Stopped) else Stopped(signal.SIGINT)
                if first:
                    print(f"\n{name}: {stopped}", file=sys.stderr)
                raise SystemExit(128 + stopped.signal) from None
        raise SystemExit(message if first else 1)

    return wrapped


@contextmanager
def signals_handled(numbers: Sequence[int], handler: Callable):
    """Within this context `handler` gets these signals. An ignored one stays ignored: nohup ignores SIGHUP,
    and shells let background jobs ignore SIGINT. Python has handlers in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Output:
    """A text stream that lives on when its reader (`train.py | head`) or the terminal has gone: the rest goes
    nowhere. A character that the terminal cannot encode becomes an escape (\\x.. or \\u....)."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream = stream or open(os.devnull, "w")  # noqa: SIM115  (None: `train.py >&-`)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.unless_left(self.stream.write, text)

    def flush(self):
        self.unless_left(self.stream.flush)

    def unless_left(self, call, *arguments):
        try:
            return call(*arguments)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def rank_info() -> tuple[int, int, int]:
    """(rank, world, local rank) among the processes that torchrun started; (0, 1, 0) without torchrun."""
    rank, world, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    try:
        if int(world or 1) in (0, 1):
            return 0, 1, 0
        found = int(rank or 0), int(world), int(local or 0)
        if 0 <= found[0] < found[1]:
            return found
    except ValueError:
        pass
    raise UserError(f"the environment says RANK={rank} of WORLD_SIZE={world}: unset both, or use torchrun")


def is_one_line(e: BaseException) -> bool:
    """Whether one line is enough for this error; a bug keeps its traceback."""
    torch = sys.modules.get("torch")  # commands that do not need it do not import it
    kinds = UserError, OSError, *([torch.OutOfMemoryError] if torch else [])
    return isinstance(e, kinds) or lacks_compiler(e)


def lacks_compiler(e: BaseException) -> bool:
    """Whether torch.compile has found no C or C++ compiler on this machine, as in slim containers."""
    return type(e).__name__ == "InductorError" and re.search(r"C(\+\+)? compiler", str(e)) is not None


def error_line(e: Exception) -> str:
    """What failed and how to go on, of an error for which `is_one_line` is true."""
    if isinstance(e, UserError):
        return str(e)
    if lacks_compiler(e):
        return "torch.compile finds no C++ compiler here: install one (g++), or add --compile=False"
    if not isinstance(e, OSError):
        cure = "a lower --batch_size takes the same steps; train.py also has --checkpoint_activations=full"
        return f"the GPU has no memory left: {cure}"
    where = f" ({e.filename})" if e.filename else ""
    if isinstance(e, FileExistsError) and os.path.islink(e.filename) and not os.path.exists(e.filename):
        return f"{e.filename} is a link to {os.readlink(e.filename)}, which is gone: make that folder first"
    cure = f": {CURES[e.errno]} and run the same command again" if e.errno in CURES else ""
    return f"{e.strerror or e}{where}; nothing written before is damaged{cure}"


def first_line(e: BaseException) -> str:
    """The first line of a library's error, which may have many; its class where it says nothing."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def noting(problems: list[str], work: Callable, *arguments):
    """Return work(*arguments). A UserError is added to `problems`, and None is returned."""
    try:
        return work(*arguments)
    except UserError as e:
        problems.append(str(e))


def raise_all(problems: Sequence[str]) -> None:
    """Raises one UserError for a list of problems, if there are any."""
    if problems:
        head = f"{len(problems)} problems:\n  " if len(problems) > 1 else ""
        raise UserError(head + "\n  ".join(problems))


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: …)" to the help of each argument that has a default."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default not in (None, "", []) else action.help


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are a UserError of one line that names the nearest flag.

    It also expands the ~ of `--flag=~/path`, which shells leave as it is.

    description: only its first paragraph is printed; `__doc__` will do. Under python -OO it is None.
    instead: {a flag of nanoGPT's, without its dashes: what to write instead}.
    """

    def __init__(self, description: str | None = None, instead: dict[str, str] | None = None, **kwargs):
        kwargs.setdefault("formatter_class", DefaultsFormatter)
        super().__init__(description=(description or "").split("\n\n")[0], allow_abbrev=False, **kwargs)
        self.instead = instead or {}

    def parse_args(self, args=None, namespace=None):
        pairs = [a.partition("=") for a in (sys.argv[1:] if args is None else args)]
        args = [flag + sign + expand_home(value) for flag, sign, value in pairs]
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            name = flag.lstrip("-").replace("-", "_")
            if name in self.instead:
                raise UserError(f"{flag} is nanoGPT's: {self.instead[name]}")
            known = [s for action in self._actions for s in action.option_strings]
            raise UserError(f"unknown argument {unknown[0]!r}{nearest(flag, known)}; --help lists all")
        return namespace

    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")


def expand_home(path: str) -> str:
    """`~/x` → `/home/me/x`; other texts stay as they are. Raises UserError where this user has no home."""
    found = os.path.expanduser(path) if path.startswith("~/") else path
    if found.startswith("~/"):
        raise UserError(f"{path}: this user has no home folder here; set HOME, or write the whole path")
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most similar to `word`: `layer` → ` (did you mean layers?)`; "" if none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
