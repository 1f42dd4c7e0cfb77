"""Work that goes on beside the training: writing a checkpoint whose tensors have been copied."""

import threading


class Background:
    """Pieces of work done in a thread, one after the other in the order in which they were started.

    When one raises an exception, `failed` is True, those behind it are not begun, and `join` raises it. The threads do
    not keep a process alive that ends otherwise than through `join` or `wait`.
    """

    def __init__(self):
        self.thread = None  # of the newest piece
        self.error = None

    @property
    def failed(self):
        return self.error is not None

    def start(self, work):
        """Do work() as soon as what was started before it is done; returns at once."""
        before = self.thread

        def run():
            if before is not None:
                before.join()
            if self.error is None:
                try:
                    work()
                except Exception as e:
                    self.error = e

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def wait(self):
        """Return when nothing is under way any more."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def join(self):
        """`wait`, and raise what went wrong, if anything did."""
        self.wait()
        error, self.error = self.error, None
        if error is not None:
            raise error
