"""Launchers that a test starts in a session of their own, and what is left of it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.given.processes import HANG_SECONDS, ROOT, command_environment


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Starts Python on the command in a session of its own, of which nothing is left when the block ends."""
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=command_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for left in session_of(process):
            left.kill()
        process.wait()


def session_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns what runs of the session that began with the process, whatever groups it has."""
    found = []
    for each in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(each.pid) == process.pid and not is_over(each):
                found.append(each)
    return found


def is_over(process: psutil.Process) -> bool:
    """Returns whether a process runs no more. An orphan may stay a zombie: not every first process waits for it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    """Returns as soon as it holds; fails when the process ends before, or nothing happens."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        # What was printed last may be what is waited for.
        assert (process.poll() is None or condition()) and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def wait_for_text(text: str, process: subprocess.Popen, log: Path) -> None:
    wait_until(lambda: text in log.read_text(), process, log)


def wait_for_end(process: subprocess.Popen, log: Path) -> int:
    """Returns the launcher's exit code; fails when it, or then one of its processes, is left."""
    try:
        code = process.wait(HANG_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running {HANG_SECONDS} s later\n{log.read_text()}")
    deadline = time.monotonic() + HANG_SECONDS
    while session_of(process):
        assert time.monotonic() < deadline, f"left: {session_of(process)}\n{log.read_text()}"
        time.sleep(0.1)
    return code


def workers_of(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """Returns the launcher's processes by their numbers."""
    children = psutil.Process(launcher.pid).children()
    numbers = {int(child.environ()["REALJAX_PROCESS_ID"]): child for child in children}
    assert sorted(numbers) == [0, 1]
    return numbers
