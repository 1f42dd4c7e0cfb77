"""SIGTERM (from a scheduler) and SIGINT (Ctrl-C) as a request to stop: finish what must be whole, save, and
end.

Where no `StopRequest` is active, errors.one_line lets both signals end a command at once; nothing written is
lost.
"""

import signal
import subprocess
import threading

from inheritune.base.errors import Stopped


class StopRequest:
    """A context in which SIGTERM and the first SIGINT only set `signal` and go on to the children of `call`.
    A second SIGINT kills these and raises KeyboardInterrupt. SIGTERM after SIGINT is the same request:
    torchrun sends its workers both.
    """

    def __init__(self):
        self.signal: int | None = None  # the first that came
        self.interrupts = 0  # how often SIGINT came
        self.children: set[subprocess.Popen] = set()

    def __enter__(self):
        self.before = {}
        main = threading.current_thread() is threading.main_thread()  # Python has handlers nowhere else
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            if signal.getsignal(number) != signal.SIG_IGN:  # shells let background jobs ignore SIGINT
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, _frame):
        self.signal = self.signal or number
        self.interrupts += number == signal.SIGINT
        for child in list(self.children):
            child.send_signal(signal.SIGKILL if self.interrupts > 1 else signal.SIGTERM)
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def call(self, command: list[str], **options) -> int:
        """Runs a command to its end and returns its exit status, as subprocess.call does. May be called in
        any thread.
        Raises Stopped, once the command has ended, if this process was asked to stop in the meantime.
        """
        with subprocess.Popen(command, **options) as child:
            self.children.add(child)
            if self.signal:  # it came before the child was in the set
                child.terminate()
            status = child.wait()
        self.children.discard(child)
        if self.signal:
            raise Stopped(self.signal)
        return status
