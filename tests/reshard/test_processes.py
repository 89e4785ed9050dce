import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("process_worker.py")
SECONDS = 400


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("num_processes", [2, 4])
def test_layouts_over_and_between_processes_are_bitwise(num_processes, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = WORKER.parents[2]
    # The programs only copy: unoptimised they compile three times as fast.
    flags = "--xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "XLA_FLAGS": flags}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    logs = [tmp_path / f"{i}.log" for i in range(num_processes)]
    commands = [
        [sys.executable, "-W", "error", str(WORKER), str(port), str(num_processes), str(i)]
        for i in range(num_processes)
    ]
    with ExitStack() as files:
        outputs = [files.enter_context(log.open("w")) for log in logs]
        workers = [
            subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
            for command, output in zip(commands, outputs)
        ]
    try:
        codes = [worker.wait(SECONDS) for worker in workers]
    finally:
        for worker in workers:  # SIGKILL: the distributed runtime traps SIGTERM
            worker.kill()
    assert codes == [0] * num_processes, "\n".join(log.read_text()[-3000:] for log in logs)
    assert all("all equal" in log.read_text() for log in logs)
