"""The first signal lets a command end well, the second ends it at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from realjax.runtime.stop import STOPS, Stopped, StopSignal
from tests.given.processes import ROOT

SIGNALS = pytest.mark.parametrize("number", STOPS, ids=lambda number: signal.Signals(number).name)


@SIGNALS
def test_the_first_raises_or_when_deferred_is_noted_and_the_old_handlers_come_back(number):
    before = [signal.getsignal(each) for each in STOPS]
    with pytest.raises(Stopped, match=signal.Signals(number).name) as stopped, StopSignal():
        os.kill(os.getpid(), number)
        time.sleep(60)
    assert stopped.value.code == 128 + number
    with StopSignal() as stop:
        stop.defer()
        assert stop.code == 0
        os.kill(os.getpid(), number)
        assert stop.code == 128 + number
    with pytest.raises(KeyError), StopSignal():
        raise KeyError
    assert [signal.getsignal(each) for each in STOPS] == before


def test_one_that_stopped_a_command_is_no_error():
    """What handles errors, in a library or here, must not take it for one."""
    assert not issubclass(Stopped, Exception)


# A long call that holds up Python's own handlers, as compiling does: the main thread is in C and gives up the lock.
SECOND = """
import ctypes, logging
from realjax.runtime.stop import StopSignal
logging.basicConfig(level=logging.INFO)
with StopSignal() as stop:
    stop.defer()
    print("ready", flush=True)
    poll = ctypes.CDLL(None).poll
    poll.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int]
    while True:
        poll(None, 0, -1)
"""


@SIGNALS
def test_a_second_ends_the_process_at_once_with_its_code_and_no_traceback(number):
    process = subprocess.Popen([sys.executable, "-c", SECOND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.stderr is not None and b"once more ends it at once" in process.stderr.readline()
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 128 + number
    assert error == b""


# As a signal does that comes while the garbage collector calls back: what is raised there goes no further.
SWALLOWED = """
import gc, os, signal, time
from realjax.runtime.stop import StopSignal
with StopSignal():
    gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    gc.collect()
    time.sleep(3600)
"""


def test_one_that_a_callback_swallows_ends_the_process():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "realjax: stopped by SIGINT before there was anything to save\n"
