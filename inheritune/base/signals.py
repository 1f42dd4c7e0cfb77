"""SIGTERM (a scheduler) and SIGINT (Ctrl-C) as a request: finish what must be whole, save, and end.

Outside a `Request`, errors.one_line lets either end a script at once, which loses nothing that was written.
"""

import signal
import subprocess
import threading

from inheritune.base.errors import Stopped


class Request:
    """While entered, SIGTERM and the first SIGINT do no more than set `signal`, and pass on to the children that
    `call` runs. A second SIGINT kills them and raises KeyboardInterrupt.

    torchrun sends its workers the signal that it got, and may send SIGTERM after SIGINT: that is the same request.
    Entered outside the main thread, where Python allows no handlers, it changes nothing; `call` may be used from any.
    """

    def __init__(self):
        self.signal = None  # the first that came
        self.interrupts = 0
        self.children = set()

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # a script's background jobs ignore SIGINT on purpose
                    self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _frame):
        self.signal = self.signal or number
        self.interrupts += number == signal.SIGINT
        for child in list(self.children):
            child.kill() if self.interrupts > 1 else child.terminate()
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def call(self, command, **how):
        """Run a command to its end and return its exit status, like subprocess.call. Raises Stopped when this process
        was asked to end meanwhile, after the command has ended."""
        with subprocess.Popen(command, **how) as child:
            self.children.add(child)
            try:
                if self.signal:  # it came between the two lines above
                    child.terminate()
                status = child.wait()
            finally:
                self.children.discard(child)
        if self.signal:
            raise Stopped(self.signal)
        return status
