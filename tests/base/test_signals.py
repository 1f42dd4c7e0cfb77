"""A request to stop goes on to the children and waits for them."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from inheritune.base.errors import Stopped
from inheritune.base.signals import StopRequest
from tests.tiny import ROOT


def test_a_child_gets_the_request_and_its_parent_waits_for_it():
    """As grow.py calls train.py: SIGTERM to the parent alone, and the child ends in good order first."""
    child = "import signal, sys, time\n"
    child += "signal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
    child += "print('ready', flush=True); time.sleep(99)"
    code = f"""
import sys; from inheritune.base import signals as stop
with stop.StopRequest() as request:
    try:
        request.call([sys.executable, "-c", {child!r}])
    except stop.Stopped as e:
        print(e, e.signal, flush=True)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.1)
    parent.terminate()
    said = "saved\ninterrupted; run the same command again to go on 15\n"
    assert parent.communicate(timeout=20)[0] == said


def test_a_second_interrupt_kills_the_children():
    with StopRequest() as request, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        request.children.add(subprocess.Popen(["sleep", "99"]))
        os.kill(os.getpid(), signal.SIGINT)
    assert [child.wait() for child in request.children] == [-signal.SIGKILL]


def test_sigterm_after_an_interrupt_is_the_same_request():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as e:
            request.call(["sleep", "99"])  # asked before it began: it ends at once
    assert e.value.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) == before


def test_commands_without_a_request_return_their_status_from_any_thread():
    statuses = []
    with StopRequest() as request:
        thread = threading.Thread(target=lambda: statuses.append(request.call(["false"])))
        thread.start()
        thread.join()
    assert statuses == [1]
