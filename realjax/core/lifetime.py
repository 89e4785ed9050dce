"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl(2)


def make_bond(parent: int | None = None) -> Callable[[], None] | None:
    """Returns what `Popen` runs in a new process so that the kernel kills it when its parent ends; None but on Linux.

    Also one that is stopped, still importing, or holds Python's lock. It is the thread that starts the process whose
    end counts. `parent` is the process's number where the new one itself asks for this.
    """
    if not sys.platform.startswith("linux"):
        return None
    # All is looked up before the fork: between fork and exec nothing may be imported or locked.
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, parent or os.getpid()

    def bind() -> None:
        prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGKILL)

    return bind
