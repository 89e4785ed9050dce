"""Processes that a test starts: one of Python, or several that run one script as a group, and what each does first."""

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from realjax.launch.environment import leave

ROOT = Path(__file__).parents[2]
# Holds a `sitecustomize` that keeps PyTorch out of sight.
WITHOUT_TORCH = Path(__file__).parent / "without_torch"
# After so long something hangs, however busy the machine is; nothing is measured with it.
HANG_SECONDS = 3600


def start_process(args: Iterable[str], log: Path, **environment: str) -> subprocess.Popen:
    """Starts Python on `args` at the top of the checkout as `command_environment` says."""
    env = command_environment() | environment
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, *args], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def command_environment() -> dict[str, str]:
    """Returns what a command starts in that a user without PyTorch gives: no device settings but the run's own.

    PyTorch is an extra, and to import it takes a quarter of the seconds of a short run.
    """
    kept = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(WITHOUT_TORCH), str(ROOT)])}


def run_workers(script: Path, num_processes: int, folder: Path, *arguments: str) -> list[str]:
    """Runs `script PORT NUM_PROCESSES PROCESS_ID *arguments` once for each process and returns what each printed.

    Fails, with the ends of the logs in `folder`, as soon as one ends with another code than 0 or the time is over.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = command_environment() | {"JAX_PLATFORMS": "cpu"}
    logs = [folder / f"{num_processes}-{i}.log" for i in range(num_processes)]
    workers: list[subprocess.Popen] = []
    try:
        for i, log in enumerate(logs):
            numbers = map(str, (port, num_processes, i))
            command = [sys.executable, "-W", "error", str(script), *numbers, *arguments]
            with log.open("w") as output:
                workers.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
        codes = wait_for_workers(workers)
    finally:
        for worker in workers:  # SIGKILL: the distributed runtime traps SIGTERM
            worker.kill()
        for worker in workers:
            worker.wait()
    texts = [log.read_text() for log in logs]
    ends = (f"process {i}, exit code {code}:\n{text[-3000:]}" for i, (code, text) in enumerate(zip(codes, texts)))
    assert codes == [0] * num_processes, "\n".join(ends)
    return texts


def wait_for_workers(workers: list[subprocess.Popen]) -> list[int | None]:
    """Returns the exit codes when all have ended, one has failed or the time is over; None: still running."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        codes = [worker.poll() for worker in workers]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.05)


def work(main: Callable[..., None], num_devices: int) -> None:
    """Runs `main(*arguments)` as a process of the group that `run_workers` started, with its share of the devices."""
    try:
        port, num_processes, process_id = map(int, sys.argv[1:4])
        jax.config.update("jax_num_cpu_devices", num_devices // num_processes)
        if num_processes > 1:
            jax.distributed.initialize(
                f"127.0.0.1:{port}",
                num_processes=num_processes,
                process_id=process_id,
                initialization_timeout=HANG_SECONDS,
                heartbeat_timeout_seconds=HANG_SECONDS,
            )
        main(*sys.argv[4:])
        if num_processes > 1:
            jax.distributed.shutdown()
    except BaseException:
        traceback.print_exc()
        # An orderly end would wait for the other processes, and they for this one.
        leave(1)
    # Threads of a timeline that nobody asked for still wait for results, which an interpreter that ends would abort.
    leave(0)
