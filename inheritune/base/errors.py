"""How a script says what is wrong: one line on stderr that names the cause and the cure, and a non-zero exit.

Everything a person can get wrong raises `UserError`; `one_line` turns it into that line at the very top of each
script. A bug still shows its traceback: only `UserError`, a full disk and the like, Ctrl-C and SIGTERM are caught.
"""

import argparse
import difflib
import errno
import functools
import os
import signal
import sys
import threading

FULL = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EFBIG: "raise the limit (ulimit -f)"}


class UserError(Exception):
    """Something the user can mend. The message is shown as it stands, so it says what to do."""


class Stopped(BaseException):
    """The process was asked to end by a signal, and everything is in good order."""

    def __init__(self, number, message="interrupted; run the same command again to go on"):
        super().__init__(message)
        self.signal = number


def nearest(word, known):
    """' (did you mean X?)' for the known word most like `word`, or '' when none is."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, without the page of usage before it, and name the nearest flag."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            known = [s for a in self._actions for s in a.option_strings]
            raise UserError(f"unknown argument {unknown[0]!r}{nearest(flag, known)}; --help lists all")
        return namespace

    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")


def of_system(e):
    """The line for an OSError: what, where, and how to go on."""
    where = f" ({e.filename})" if e.filename else ""
    cure = f": {FULL[e.errno]} and run the same command again" if e.errno in FULL else ""
    return f"{e.strerror or e}{where}; nothing written before is damaged{cure}"


def one_line(main):
    """Decorate a script's `main(argv=None)`: a UserError or OSError becomes one line and exit status 1; SIGINT and
    SIGTERM end it in one line too, with the usual exit status, 128 + the signal's number.

    Under torchrun, what every rank has to say is said by rank 0 only.
    """

    def terminate(number, _frame):
        raise Stopped(number)

    @functools.wraps(main)
    def wrapped(argv=None):
        script = os.path.basename(main.__globals__["__file__"])
        first = os.environ.get("RANK", "0") == "0"
        handled = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, terminate) if handled else None
        try:
            return main(argv)
        except UserError as e:
            message = f"{script}: {e}"
        except OSError as e:  # disk full, permission denied, a folder where a file should be …
            message = f"{script}: {of_system(e)}"
        except (KeyboardInterrupt, Stopped) as e:
            stopped = e if isinstance(e, Stopped) else Stopped(signal.SIGINT)
            if first:
                print(f"\n{script}: {stopped}", file=sys.stderr)
            raise SystemExit(128 + stopped.signal) from None
        finally:
            if handled:
                signal.signal(signal.SIGTERM, before)
        raise SystemExit(message if first else 1)

    return wrapped
