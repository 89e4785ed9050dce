import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("generate_worker.py")
SECONDS = 400


@pytest.mark.slow
@pytest.mark.e2e
def test_every_process_has_the_tokens_of_layouts_over_both_and_of_the_other(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = "--xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[2]), "XLA_FLAGS": flags}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    workers = []
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, "-W", "error", str(WORKER), str(port), str(i)]
            with log.open("w") as output:
                workers.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
        codes = [worker.wait(SECONDS) for worker in workers]
    finally:
        for worker in workers:  # SIGKILL: the distributed runtime traps SIGTERM
            worker.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    assert all("all equal" in log.read_text() for log in logs)
