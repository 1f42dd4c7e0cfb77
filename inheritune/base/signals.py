"""Signals as a request to stop: finish what must be whole, save, and end.

Without an active `StopRequest`, errors.one_line lets these signals end a command at once. Nothing that was
written is lost.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

from inheritune.base.errors import STOP_SIGNALS, Stopped, signals_handled


@contextlib.contextmanager
def ended_after(hours: float | None) -> Iterator[None]:
    """Within this context this process gets SIGTERM after that many hours. None: it never does."""

    def end():
        print(f"max_hours: {hours:g} hours are over", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    if hours is None:
        yield
        return
    timer = threading.Timer(hours * 3600, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class StopRequest:
    """A context in which STOP_SIGNALS and the first SIGINT only set `signal`; the children of `call` get
    SIGTERM.

    A second SIGINT kills the children and raises KeyboardInterrupt. SIGTERM after SIGINT is the same request,
    because torchrun sends its workers both.
    """

    def __init__(self):
        self.signal: int | None = None  # the first that came
        self.interrupts = 0  # how often SIGINT came
        self.children: set[subprocess.Popen] = set()

    def __enter__(self):
        self.handled = signals_handled((signal.SIGINT, *STOP_SIGNALS), self.handle)
        self.handled.__enter__()
        return self

    def __exit__(self, *error):
        self.handled.__exit__(*error)

    def handle(self, number, _frame):
        self.signal = self.signal or number
        self.interrupts += number == signal.SIGINT
        for child in list(self.children):
            child.send_signal(signal.SIGKILL if self.interrupts > 1 else signal.SIGTERM)
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def call(self, command: list[str], **options) -> int:
        """Runs a command to its end and returns its exit status, as subprocess.call does, in any thread.

        options: of subprocess.Popen.

        Raises Stopped, once the command has ended, if this process was asked to stop in the meantime.
        """
        with subprocess.Popen(command, **options) as child:
            self.children.add(child)
            if self.signal:  # the signal came before the child was in the set
                child.terminate()
            status = child.wait()
        self.children.discard(child)
        if self.signal:
            raise Stopped(self.signal)
        return status
