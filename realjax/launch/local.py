"""Starts a run in several processes here: `python -m launch.local --processes 2 --devices 4 -- sft key=value ...`.

Their logs are merged, each line behind its process's number. When one process ends, the others are ended too, so that a
failure is a message and not a hang.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from realjax.launch.environment import COORDINATOR, LIFELINE, NUM_PROCESSES, PROCESS_ID, PROCESSES_PER_NODE
from realjax.launch.native_lines import NativeLines

XLA_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # JAX sets it to 1; whoever sets it to 0 wants to see what XLA says
# Time for the other processes to end by themselves after one has: they may be in their last save.
GRACE_SECONDS = 60
# The same after a failure: what the others do cannot succeed, but they may have something to say.
FAILURE_SECONDS = 5
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the codes of a run that a signal stopped after a save
# Of several codes seen at once any other one is the cause: a lost peer is an error (1), or aborts the process.
CONSEQUENCES = (1, 128 + signal.SIGABRT, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns 0, or the exit code of the process that failed first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="processes on this machine")
    parser.add_argument(
        "--devices", type=int, help="devices of each process; default: those of n_gpus_per_node, divided"
    )
    parser.add_argument("--coordinator", help="host:port of process 0, for processes on several machines")
    parser.add_argument("--num-processes", type=int, help="processes on all machines; default: those on this one")
    parser.add_argument("--first-process", type=int, default=0, help="number of this machine's first process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- then an experiment and its options")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.processes < 1 or not command:
        parser.error("needs --processes of at least 1, and a command such as: -- sft model.path=...")
    if args.devices is not None:
        command = [*command, f"n_gpus_per_node={args.devices * args.processes}"]
    return run_processes([sys.executable, "-m", "realjax.apps.quickstart", *command], args)


def run_processes(command: list[str], args: argparse.Namespace) -> int:
    """Starts the processes, merges their output, and waits for all."""
    coordinator = args.coordinator or f"127.0.0.1:{free_port()}"
    common = {
        COORDINATOR: coordinator,
        NUM_PROCESSES: str(args.num_processes or args.processes),
        PROCESSES_PER_NODE: str(args.processes),
    }
    processes: list[subprocess.Popen] = []
    signals = forward_signals(processes)
    # Its other end closes with this process, however that ends; each of ours watches for it.
    lifeline, held = os.pipe()
    readers = []
    for i in range(args.first_process, args.first_process + args.processes):
        env = os.environ | common | {PROCESS_ID: str(i), LIFELINE: str(lifeline)}
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[lifeline],
            process_group=0,  # a terminal's Ctrl-C goes to its whole group: here to us alone, who pass it on once
        )
        reader = threading.Thread(target=copy_lines, args=(process, i), daemon=True)
        reader.start()
        processes.append(process)
        readers.append(reader)
    code = wait_for_all(processes, signals)
    for reader in readers:
        reader.join(timeout=5)
    os.close(held)
    return code


def forward_signals(processes: list[subprocess.Popen]) -> list[int]:
    """Has SIGINT and SIGTERM passed on to the processes, and returns the list that each of them is added to."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return received


def wait_for_all(processes: list[subprocess.Popen], signals: Sequence[int] = ()) -> int:
    """Returns 0, or the code of the first process to fail; ends those that outlive another for too long.

    A process that a signal ended has the shell's code for it, 128 and the signal's number. After a second of the
    `signals` that are passed on to them, none has more time than after a failure.
    """
    code, deadline = 0, float("inf")
    while True:
        ended = [_shell_code(process) for process in processes if process.poll() is not None]
        if ended and deadline == float("inf"):
            code = min(ended, key=lambda c: CONSEQUENCES.index(c) if c in CONSEQUENCES else -1)
            is_failure = code not in (0, *STOPPED)
            deadline = time.monotonic() + (FAILURE_SECONDS if is_failure else GRACE_SECONDS)
            if is_failure and not signals:
                print(f"launch: a process ended with code {code}, so the others are ended too", flush=True)
        if len(ended) == len(processes):
            return code or max(ended)
        if len(signals) > 1:
            deadline = min(deadline, time.monotonic() + FAILURE_SECONDS)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)


def _shell_code(process: subprocess.Popen) -> int:
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def copy_lines(process: subprocess.Popen, number: int) -> None:
    """Prints a process's lines behind its number, without those of XLA's libraries that are no errors."""
    assert process.stdout is not None
    shows_all, native = os.environ.get(XLA_LOG_LEVEL) == "0", NativeLines()
    for line in process.stdout:
        if shows_all or native.shows(line):
            print(f"[{number}] {line}", end="", flush=True)
    if not shows_all and (words := native.last_words()):
        print(f"[{number}] {words}", flush=True)


def free_port() -> int:
    """Returns a port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
