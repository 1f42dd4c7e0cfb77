"""SIGTERM (from a scheduler) and SIGINT (Ctrl-C) as a request to stop: finish what must be whole, save, and
end.

Where no `Request` is active, errors.one_line lets both signals end a command at once; nothing written is
lost.
"""

import signal
import subprocess
import threading

from inheritune.base.errors import Stopped


class Request:
    """A context in which SIGTERM and the first SIGINT only set `signal` and go on to the children started by
    `call`.

    A second SIGINT kills the children and raises KeyboardInterrupt. SIGTERM after SIGINT is the same request:
    torchrun sends its workers both. Entered outside the main thread, where Python allows no handlers, it has
    no effect.
    """

    def __init__(self):
        self.signal: int | None = None  # the first that came
        self.interrupts = 0  # how often SIGINT came
        self.children: set[subprocess.Popen] = set()

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # shells let background jobs ignore SIGINT
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, _frame):
        self.signal = self.signal or number
        self.interrupts += number == signal.SIGINT
        again = self.interrupts > 1
        for child in list(self.children):
            child.kill() if again else child.terminate()
        if again:
            raise KeyboardInterrupt

    def call(self, command: list[str], **options) -> int:
        """Runs a command to its end and returns its exit status, as subprocess.call does. May be called in
        any thread.

        Raises Stopped, once the command has ended, if this process was asked to stop in the meantime.
        """
        with subprocess.Popen(command, **options) as child:
            self.children.add(child)
            try:
                if self.signal:  # the signal came before the child was in the set
                    child.terminate()
                status = child.wait()
            finally:
                self.children.discard(child)
        if self.signal:
            raise Stopped(self.signal)
        return status
