"""Starts a run in several processes here: `python -m launch.local --processes 2 --devices 4 -- sft key=value ...`.

Their logs are merged, each line behind its process's number. When one process ends, the others are ended too, so that a
failure is a message and not a hang; with recover_mode=auto all are then started again, at most recover_retries times.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from realjax.core.exit_codes import CONSEQUENCES, KILLED, STOPPED
from realjax.core.lifetime import make_bond
from realjax.launch.accelerators import count_accelerators
from realjax.launch.environment import COORDINATOR, LIFELINE, NUM_PROCESSES, PROCESS_ID, PROCESSES_PER_NODE
from realjax.launch.native_lines import NativeLines
from realjax.launch.output import MergedOutput
from realjax.launch.restarts import count_retries, find_word, is_retried, pause_seconds

XLA_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # JAX sets it to 1; whoever sets it to 0 wants to see what XLA says
# Time for the other processes to end by themselves after one has: they may be in their last save.
GRACE_SECONDS = 60
# The same after a failure: what the others do cannot succeed, but they may have something to say.
FAILURE_SECONDS = 5
STOPS = (signal.SIGTERM, signal.SIGINT)
DEFAULT_GPUS_PER_NODE = 8  # of a machine that is not known, or has none


@dataclass(frozen=True, kw_only=True)
class Share:
    """The processes of a run that this machine has: `processes` of `num_processes` (None: these are all)."""

    processes: int
    num_processes: int | None = None
    first_process: int = 0
    coordinator: str | None = None  # None: a free port of this machine, another one for each start

    def environment(self) -> dict[str, str]:
        """Returns what all of the processes are told."""
        return {
            COORDINATOR: self.coordinator or f"127.0.0.1:{free_port()}",
            NUM_PROCESSES: str(self.num_processes or self.processes),
            PROCESSES_PER_NODE: str(self.processes),
        }


class Process(Protocol):
    """What a launcher needs of a process; `subprocess.Popen` is one."""

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Running:
    """The processes under way, and the signals that came for them: a second one is final."""

    processes: list[Process] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def forward(self, number: int, frame: FrameType | None = None) -> None:
        """Passes a signal on; the third one kills what a second one left."""
        self.signals.append(number)
        self.stopping.set()
        for process in self.processes:
            process.send_signal(number if len(self.signals) < 3 else signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns 0, or the exit code of the process that failed first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument("--processes", type=int, help="processes on this machine")
    number.add_argument("--per-device", action="store_true", help="a process for each device of n_gpus_per_node")
    parser.add_argument(
        "--devices", type=int, help="devices of each process; default: those of n_gpus_per_node, divided"
    )
    parser.add_argument("--coordinator", help="host:port of process 0, for processes on several machines")
    parser.add_argument("--num-processes", type=int, help="processes on all machines; default: those on this one")
    parser.add_argument("--first-process", type=int, default=0, help="number of this machine's first process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- then an experiment and its options")
    args = parser.parse_args(argv)
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.per_device:
        num_devices = find_word(words, "n_gpus_per_node") or count_accelerators(os.environ) or DEFAULT_GPUS_PER_NODE
        args.processes = int(num_devices)
    if args.processes < 1 or not words:
        parser.error("needs --processes of at least 1, and a command such as: -- sft model.path=...")
    if args.devices is not None:
        words = [*words, f"n_gpus_per_node={args.devices * args.processes}"]
    try:
        num_retries = count_retries(words)
    except ValueError as error:
        parser.error(str(error))
    share = Share(
        processes=args.processes,
        num_processes=args.num_processes,
        first_process=args.first_process,
        coordinator=args.coordinator,
    )
    return run_processes([sys.executable, "-m", "realjax.apps.quickstart", *words], share, num_retries)


def run_processes(command: list[str], share: Share, num_retries: int = 0) -> int:
    """Runs the processes to their end, again after a failure, and returns the code of the last time."""
    return run_again(lambda running: run_once(command, share, running), num_retries)


def run_again(run_fn: Callable[[Running], int], num_retries: int) -> int:
    """Calls `run_fn` until its code is none that is tried again, and returns that; signals go to what is running."""
    running, attempt = Running(), 0
    with forwarded(running):
        while True:
            code = run_fn(running)
            if not is_retried(code) or running.signals or attempt == num_retries:
                return code
            attempt += 1
            pause, times = pause_seconds(attempt), f"({attempt} of {num_retries} times)"
            _say(f"the run ended with code {code}: it is started again in {pause:.0f} s {times}")
            if running.stopping.wait(pause):
                return code


@contextmanager
def forwarded(running: Running) -> Iterator[None]:
    """While entered, signals that stop a command go to what is running, and then again to whom they went before."""
    previous = {number: signal.signal(number, running.forward) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None: one that is not Python's, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def run_once(command: list[str], share: Share, running: Running) -> int:
    """Starts the processes, merges their output, and waits for all."""
    # Its other end closes with this process, however that ends; each of ours watches for it.
    lifeline, held = os.pipe()
    try:
        processes = start_processes(command, share, running, lifeline)
        with MergedOutput(len(processes)) as output:
            readers = [
                threading.Thread(target=copy_lines, args=(process, i, output), daemon=True)
                for i, process in enumerate(processes, start=share.first_process)
            ]
            for reader in readers:
                reader.start()
            code = wait_for_all(processes, running.signals)
            for reader in readers:
                reader.join(timeout=5)
    finally:
        os.close(lifeline)
        os.close(held)
    return code


def start_processes(command: list[str], share: Share, running: Running, lifeline: int) -> list[subprocess.Popen]:
    """Starts this machine's processes, in place of those that were running. No other thread may be running yet."""
    common, bond = os.environ | share.environment(), make_bond()
    running.processes.clear()
    started: list[subprocess.Popen] = []
    for i in range(share.first_process, share.first_process + share.processes):
        process = subprocess.Popen(
            command,
            env=common | {PROCESS_ID: str(i), LIFELINE: str(lifeline)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[lifeline],
            process_group=0,  # a terminal's Ctrl-C goes to its whole group: here to us alone, who pass it on once
            preexec_fn=bond,
        )
        started.append(process)
        running.processes.append(process)
        if running.signals:  # it came before this one was among them
            process.send_signal(running.signals[-1])
    return started


def wait_for_all(processes: Sequence[Process], signals: Sequence[int] = ()) -> int:
    """Returns 0, or the code of the first process to fail; ends those that outlive another for too long.

    A process that a signal ended has the shell's code for it, 128 and the signal's number. After a second of the
    `signals` that are passed on to them, none has more time than after a failure, and those killed then were ended by
    that signal.
    """
    code, deadline = 0, float("inf")
    while True:
        ended = [_shell_code(found) for process in processes if (found := process.poll()) is not None]
        if ended and deadline == float("inf"):
            code = min(ended, key=lambda c: CONSEQUENCES.index(c) if c in CONSEQUENCES else -1)
            is_failure = code not in (0, *STOPPED)
            deadline = time.monotonic() + (FAILURE_SECONDS if is_failure else GRACE_SECONDS)
            if is_failure and not signals:
                _say(f"a process ended with code {code}, so the others are ended too")
        if len(ended) == len(processes):
            code = code or max(ended)
            return 128 + signals[-1] if code == KILLED and len(signals) > 1 else code
        if len(signals) > 1:
            deadline = min(deadline, time.monotonic() + FAILURE_SECONDS)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)


def _shell_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def copy_lines(process: subprocess.Popen, number: int, output: MergedOutput) -> None:
    """Copies a process's lines, see `Filter`."""
    assert process.stdout is not None
    lines = Filter(number, output)
    for line in process.stdout:
        lines.write(line)
    lines.close()


class Filter:
    """Passes a process's lines on, without those of XLA's libraries that are no errors."""

    def __init__(self, number: int, output: MergedOutput) -> None:
        self._number, self._output, self._native = number, output, NativeLines()
        self._shows_all = os.environ.get(XLA_LOG_LEVEL) == "0"

    def write(self, line: str) -> None:
        """Takes the next line."""
        if self._shows_all or self._native.shows(line):
            self._output.write(self._number, line)

    def close(self) -> None:
        """Says what there is to say of the end of a process that lost the others."""
        if not self._shows_all and (words := self._native.last_words()):
            self._output.write(self._number, words)


def free_port() -> int:
    """Returns a port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _say(line: str) -> None:
    print(f"launch: {line}", flush=True)
