"""How commands report errors: one line on stderr that names the problem and the fix, and a non-zero status.

Whatever a user can get wrong raises `UserError`; `one_line` wraps each command's `main` and prints that line.
OSError (a full disk, a missing permission), Ctrl-C and SIGTERM are caught too; bugs keep their traceback.
"""

import argparse
import difflib
import errno
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence

CURES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space")
CURES[errno.EFBIG] = "raise the limit (ulimit -f)"


class UserError(Exception):
    """A mistake the user can fix. The message is printed unchanged, so it says what to do."""


class Stopped(BaseException):
    """A signal asked this process to end, and everything worth keeping is saved."""

    def __init__(self, number: int, message: str = "interrupted; run the same command again to go on"):
        super().__init__(message)
        self.signal = number


def one_line(main: Callable, ranks: bool = False) -> Callable:
    """Decorates a command's `main(argv=None)`: errors end it with one line on stderr instead of a traceback.

    Exit status: 1 after a UserError or OSError, 128 + the signal's number after SIGINT or SIGTERM. Of a
    command that torchrun may start (ranks=True) only rank 0 prints. Characters that the terminal cannot
    encode are printed as \\x.. or \\u.... escapes.
    """

    def terminate(number, _frame):
        raise Stopped(number)

    @functools.wraps(main)
    def wrapped(argv=None):
        # all commands pass here: printing must not fail, whatever the terminal's encoding
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        name = os.path.basename(main.__globals__["__file__"])
        first = True

        # SIGTERM raises Stopped, as SIGINT raises KeyboardInterrupt (Python: in the main thread only)
        handled = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, terminate) if handled else None
        try:
            first = not ranks or rank_info()[0] == 0
            return main(argv)
        except (UserError, OSError) as e:
            message = f"{name}: {describe(e)}"
        except (KeyboardInterrupt, Stopped) as e:
            stopped = e if isinstance(e, Stopped) else Stopped(signal.SIGINT)
            if first:
                print(f"\n{name}: {stopped}", file=sys.stderr)
            raise SystemExit(128 + stopped.signal) from None
        finally:
            if handled:
                signal.signal(signal.SIGTERM, before)
        raise SystemExit(message if first else 1)

    return wrapped


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


def describe(e: UserError | OSError) -> str:
    """What failed, and how to go on; of an OSError also on which file."""
    if isinstance(e, UserError):
        return str(e)
    where = f" ({e.filename})" if e.filename else ""
    cure = f": {CURES[e.errno]} and run the same command again" if e.errno in CURES else ""
    return f"{e.strerror or e}{where}; nothing written before is damaged{cure}"


def raise_all(problems: Sequence[str]) -> None:
    """Raises one UserError for a list of problems, if there are any."""
    if problems:
        head = f"{len(problems)} problems:\n  " if len(problems) > 1 else ""
        raise UserError(head + "\n  ".join(problems))


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError with one line (no usage text) and names the nearest flag, and
    expands the ~ of --flag=~/path, which shells leave as it is.

    instead: {nanoGPT's name of a flag: what to write instead}.
    """

    def __init__(self, instead: dict[str, str] | None = None, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.instead = instead or {}

    def parse_args(self, args=None, namespace=None):
        pairs = [a.partition("=") for a in (sys.argv[1:] if args is None else args)]
        args = [flag + sign + (os.path.expanduser(v) if v.startswith("~/") else v) for flag, sign, v in pairs]
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


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' with the known word most similar to `word`, or '' if none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
