"""Calls on disjoint devices run at the same time, and give what they give one after the other."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("overlap_worker.py")
SECONDS = 300


def run_workers(num_processes: int, folder: Path) -> list[dict]:
    """Returns what the first of the processes printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Unoptimised, the programs compile in half the time.
    flags = "--xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[2]), "XLA_FLAGS": flags}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    logs = [folder / f"{num_processes}-{i}.log" for i in range(num_processes)]
    with ExitStack() as files:
        outputs = [files.enter_context(log.open("w")) for log in logs]
        workers = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(port), str(num_processes), str(i)],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for i, output in enumerate(outputs)
        ]
    try:
        codes = [worker.wait(SECONDS) for worker in workers]
    finally:
        for worker in workers:  # SIGKILL: the distributed runtime traps SIGTERM
            worker.kill()
    assert codes == [0] * num_processes, "\n".join(log.read_text()[-3000:] for log in logs)
    return json.loads(logs[0].read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.e2e
def test_calls_on_disjoint_devices_of_two_processes_overlap(tmp_path):
    alone, apart = (run_workers(n, tmp_path) for n in (1, 2))
    for ours, theirs in zip(apart, alone, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    # The first step compiles, in each process as long as it takes.
    for step in apart[1:]:
        (long_start, long_end), (short_start, short_end) = step["times"]["long"], step["times"]["short"]
        assert max(long_start, short_start) < min(long_end, short_end)
        # Made second, done first: one after the other it would end last.
        assert short_end < long_end
