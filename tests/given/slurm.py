"""A real Slurm of two nodes on this machine, for tests of jobs."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol")
NODES = ("n1", "n2")
SECONDS_TO_START = 60
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
MpiDefault=none
AuthInfo=cred_expire=5
KillWait=5
SlurmdTimeout=10
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs={cpus} RealMemory=100 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster's folder, and what its commands find it by."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, *command: str) -> str:
        """Returns what a command prints, which must not fail."""
        asked = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        assert asked.returncode == 0, (command, asked.stdout, asked.stderr)
        return asked.stdout

    def start_node(self, name: str) -> None:
        self.run("slurmd", "-c", "-f", self.environment["SLURM_CONF"], "-N", name)

    def kill_node(self, name: str) -> None:
        """Has a node die: its daemon, and the tasks that run there."""
        os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)
        for task in self.find_tasks(name):
            task.kill()

    def find_tasks(self, node: str) -> list[psutil.Process]:
        """Returns what runs of steps on a node, those in a job's script left out."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                is_task = "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
                if is_task and environment.get("SLURMD_NODENAME") == node:
                    found.append(process)
        return found


def find_reason_to_skip() -> str | None:
    """Returns why there can be no Slurm here, None where there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine: install Debian's slurm-wlm and munge"
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root"
    try:  # JAX takes the first node for the coordinator's host
        socket.gethostbyname(NODES[0])
    except OSError:
        return f"{NODES[0]} does not resolve: 127.0.0.1 {' '.join(NODES)} has to stand in the file of hosts"
    return None


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Gives a cluster of two idle nodes, which ends with the block; skips the test where there can be none."""
    if reason := find_reason_to_skip():
        pytest.skip(reason)
    cluster = Cluster(folder=folder, environment={"SLURM_CONF": str(folder / "slurm.conf")})
    ports, host = _free_ports(3), socket.gethostname()
    (folder / "slurm.conf").write_text(
        CONFIG.format(cpus=os.cpu_count(), folder=folder, port=ports[0], ports=f"{ports[1]},{ports[2]}", host=host)
    )
    (folder / "state").mkdir()
    _start_munge()
    try:
        cluster.run("slurmctld", "-c", "-f", cluster.environment["SLURM_CONF"])
        for node in NODES:
            cluster.start_node(node)
        deadline = time.monotonic() + SECONDS_TO_START
        while cluster.run("sinfo", "--noheader", "--format=%D %t").split() != ["2", "idle"]:
            assert time.monotonic() < deadline, (folder / "controller.log").read_text()
            time.sleep(0.2)
        yield cluster
    finally:
        for name in (*NODES, "controller"):
            path = folder / f"{name}.pid"
            if path.exists():
                subprocess.run(["kill", path.read_text().strip()], check=False)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _start_munge() -> None:
    """Starts the daemon that Slurm's commands trust each other by, unless it is there."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return
    subprocess.run(["install", "-d", "-o", "munge", "-m", "755", "/run/munge"], check=True)
    subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged") or "munged"], check=True)
