"""How a script says what is wrong: one line on stderr that names the cause and the cure, and a non-zero exit.

Everything a person can get wrong raises `UserError`; `one_line` turns it into that line at the very top of each
script. A bug still shows its traceback: only `UserError`, a full disk and the like, and Ctrl-C are caught.
"""

import argparse
import difflib
import functools
import os
import sys


class UserError(Exception):
    """Something the user can mend. The message is shown as it stands, so it says what to do."""


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


def one_line(main):
    """Decorate a script's `main(argv=None)`: a UserError or OSError becomes one line and exit status 1.

    Under torchrun, errors that every rank meets are shown by rank 0 only.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        script = os.path.basename(main.__globals__["__file__"])
        try:
            return main(argv)
        except UserError as e:
            message = f"{script}: {e}"
        except OSError as e:  # disk full, permission denied, a folder where a file should be …
            where = f" ({e.filename})" if e.filename else ""
            message = f"{script}: {e.strerror or e}{where}; nothing written before is damaged"
        except KeyboardInterrupt:
            print(f"\n{script}: interrupted; run the same command again to go on", file=sys.stderr)
            raise SystemExit(130) from None
        raise SystemExit(message if os.environ.get("RANK", "0") == "0" else 1)

    return wrapped
