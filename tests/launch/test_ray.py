"""Processes that Ray's actors start, on a real Ray of two nodes: their output, their signals, and their ends."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from realjax.core.exit_codes import KILLED
from realjax.launch import local, restarts
from realjax.launch.ray import RayJob, import_ray
from tests.given.launched import is_over
from tests.given.ray import needs_ray, ray_cluster

# Ray forks, of which JAX warns, and leaves files and sockets open.
pytestmark = pytest.mark.filterwarnings("ignore")
SAYS = """
import os
from realjax.launch.environment import find_process_group
group = find_process_group(os.environ)
print(f"{group.process_id} of {group.num_processes}, {group.processes_per_node} a node, {os.environ['OWN']}")
"""
WAITS = "import os, time; print('ready', os.getpid(), flush=True); time.sleep(1e4)"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster(cpus_per_node=2) as address:
        yield address


def run(program: str, address: str, **changes: object) -> int:
    options = {"num_processes": 2, "processes_per_node": 1, "environment": {"OWN": "own"}} | changes
    return RayJob(command=(sys.executable, "-c", program), **options).run(address)


@needs_ray
def test_each_process_knows_its_place(address, capsys):
    assert run(SAYS, address) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [f"[{i}] {i} of 2, 1 a node, own" for i in range(2)]


@needs_ray
def test_one_that_fails_ends_all_and_they_start_again(address, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(restarts, "FIRST_PAUSE_SECONDS", 0.1)
    program = f"""
import os, sys, time
from pathlib import Path
once = Path({str(tmp_path / "once")!r})
if os.environ["REALJAX_PROCESS_ID"] == "1" and not once.exists():
    once.touch(); sys.exit(75)
time.sleep(0 if once.exists() and os.environ["REALJAX_PROCESS_ID"] == "1" else 1)
print("done")
"""
    assert run(program, address, num_restarts=1) == 0
    assert "the run ended with code 75: it is started again" in capsys.readouterr().out


@needs_ray
def test_a_killed_actor_takes_its_process_along_and_ends_the_run(address, capfd):
    codes, seen = [], ""
    job = threading.Thread(target=lambda: codes.append(run_without_signals(address)))
    job.start()
    while seen.count("ready") < 2:
        time.sleep(0.1)
        seen += capfd.readouterr().out
    pids = [int(pid) for pid in re.findall(r"ready (\d+)", seen)]
    workers = [psutil.Process(pid) for pid in pids]
    parent = workers[0].parent()
    assert parent is not None
    parent.kill()
    job.join()
    assert codes == [KILLED]
    left = psutil.wait_procs(workers, timeout=10)[1]
    assert all(map(is_over, left))


def run_without_signals(address: str) -> int:
    """Runs in a thread, which cannot have handlers of signals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.signal, "signal", lambda number, handler: None)
        return run(WAITS, address)


def test_without_ray_it_is_said_what_lacks(monkeypatch):
    monkeypatch.setattr("realjax.launch.ray.is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"^ray: not installed .* realjax\[ray\]"):
        import_ray()


def test_no_cluster_is_an_error_of_the_users(monkeypatch):
    def init(**options: object) -> None:
        raise ConnectionError("nobody answers\nand more of it")

    monkeypatch.setattr("realjax.launch.ray.import_ray", lambda: SimpleNamespace(init=init))
    with pytest.raises(ValueError, match=r"^ray: no cluster at '127.0.0.1:1' \(nobody answers\); start one"):
        run(SAYS, "127.0.0.1:1")
