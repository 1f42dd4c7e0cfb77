"""Errors are one line and an exit status; output never fails for want of an encoding."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from inheritune.base import errors
from inheritune.base.errors import STOP_SIGNALS, Stopped, UserError, one_line
from tests.tiny import ROOT


def command(error, ranks=False):
    """A command's main that ends with this error."""

    def main(argv=None):
        raise error

    return one_line(ranks=ranks)(main)


@pytest.mark.parametrize(
    "of_ranks, environment, printed",
    [(True, "12", False), (True, "02", True), (True, "11", True), (True, "1", True), (False, "12", True)],
)
def test_only_rank_0_prints(monkeypatch, capsys, of_ranks, environment, printed):
    """... of a command that has ranks. A RANK without others is what some shells and pods leave behind."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in zip(("RANK", "WORLD_SIZE"), environment, strict=False):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        command(UserError("no data"), ranks=of_ranks)()
    assert end.value.code == ("test_errors.py: no data" if printed else 1)
    with pytest.raises(SystemExit) as end:
        command(Stopped(signal.SIGTERM), ranks=of_ranks)()
    assert end.value.code == 143 and bool(capsys.readouterr().err) == printed


def test_signals_end_a_command_with_their_usual_status(capsys):
    for error, status in ((KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM, "saved"), 143)):
        with pytest.raises(SystemExit) as end:
            command(error)()
        assert end.value.code == status
    said = "\ntest_errors.py: interrupted; run the same command again to go on\n\ntest_errors.py: saved\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("number", STOP_SIGNALS[:2])
def test_a_signal_ends_a_command_at_once_and_is_handled_as_before_after_it(number):
    @one_line
    def main(argv=None):
        os.kill(os.getpid(), number)
        return "not reached"

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 128 + number and signal.getsignal(number) == signal.SIG_DFL


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert one_line(lambda argv=None: os.kill(os.getpid(), signal.SIGHUP) or "reached")() == "reached"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_leaves_ends_no_command(tmp_path):
    """`command | head -1`: the rest is printed to nobody, and the command goes on to its end."""
    code = "import time; from inheritune.base.errors import one_line; __file__ = 'x'\n@one_line\n"
    code += "def main(argv=None):\n  for i in range(3000):\n    print(i, 'a line', flush=True)\n"
    code += f"  open({str(tmp_path / 'end')!r}, 'w').close()\nmain()"
    command = ["bash", "-c", 'set -o pipefail; "$1" -c "$2" | head -1', "-", sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 a line\n", "")
    assert (tmp_path / "end").exists()


def test_a_terminal_that_goes_away_or_a_closed_output_ends_no_command():
    master, terminal = os.openpty()
    with open(terminal, "w") as stream:
        os.close(master)
        output = errors.Output(stream)
        print("a line\n" * 3, file=output, flush=True)  # the terminal's error is EIO
        print("another", file=output, flush=True)
    print("a line", file=errors.Output(None), flush=True)  # as Python gives it for `command >&-`


def test_home_is_expanded_or_missed_by_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [errors.expand_home(path) for path in ("~/x", "a~/x", "~")] == ["/home/me/x", "a~/x", "~"]
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor an entry in passwd
    with pytest.raises(UserError, match="~/x: this user has no home folder here"):
        errors.expand_home("~/x")


def test_errors_of_the_system_say_what_failed_where_and_how_to_go_on():
    full, denied = (OSError(number, os.strerror(number), "a/b") for number in (errno.ENOSPC, errno.EACCES))
    said = "No space left on device (a/b); nothing written before is damaged"
    assert errors.error_line(full) == f"{said}: free some space and run the same command again"
    assert errors.error_line(denied) == "Permission denied (a/b); nothing written before is damaged"


def test_a_link_to_nowhere_as_a_folder_to_make_is_named(tmp_path):
    (tmp_path / "out").symlink_to("gone")
    with pytest.raises(FileExistsError) as e:
        os.makedirs(tmp_path / "out", exist_ok=True)
    said = f"{tmp_path}/out is a link to gone, which is gone: make that folder first"
    assert errors.error_line(e.value) == said


def test_a_parser_is_described_by_the_first_lines_of_a_docstring_if_there_is_one():
    assert errors.Parser("What it does.\n\nMore.").description == "What it does."
    assert errors.Parser(None).parse_args([]), "python -OO has none"


@pytest.mark.parametrize(
    "encoding, printed", [("ascii", "\\xfc\\u2026"), ("cp1252", "ü…"), ("latin-1", "ü\\u2026")]
)
def test_a_terminal_without_our_characters(encoding, printed, monkeypatch):
    """Folders, messages and sampled text hold characters outside its encoding."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    one_line(lambda argv=None: print("ü… 𝄞"))()
    assert sys.stdout is terminal
    assert terminal.buffer.getvalue().decode(encoding) == f"{printed} \\U0001d11e\n"
