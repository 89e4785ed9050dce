"""Runs as jobs of a real Slurm: over two nodes, put back into the queue, with a process killed, with a node lost."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from realjax.launch.slurm import find_exit_code, find_state
from tests.given.commands import Given, Trial
from tests.given.compare import find_differing
from tests.given.processes import HANG_SECONDS, ROOT
from tests.given.slurm import NODES, Cluster, slurm_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
COMMON = {"mode": "slurm", "n_nodes": 2, "n_gpus_per_node": 4, "allocation_mode": "d8p1m1", "recover_retries": 1}
OPTIONS = {
    "sft": {**COMMON, "dataset.train_bs_n_seqs": 40, "total_train_epochs": 1},
    "ppo": {
        **COMMON,
        "dataset.train_bs_n_seqs": 16,
        "algo.ppo_n_minibatches": 2,
        "total_train_epochs": 6,
        "save_freq_steps": 2,
    },
}
ROLES = ("actor", "critic")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        # Of this process alone.
        patch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        yield cluster


def submit(trial: Trial) -> int:
    """Submits the trial from this machine as from a login node, and returns the job's number."""
    command = [sys.executable, "-m", "realjax.apps.quickstart", "launch", "slurm", "--no-gpus"]
    command += [trial.experiment, *trial.words()]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    return int(re.findall(r"job (\d+) was submitted", asked.stdout)[0])


def text_of_job(trial: Trial) -> str:
    folder = trial.folder("logs").with_name("trial.slurm")
    paths = [folder / "job.log", *sorted(folder.glob("attempt_*/*.log"))]
    return "\n".join(f"=== {path}\n{path.read_text()}" for path in paths if path.exists())


def wait_until(condition: Callable[[], bool], trial: Trial, job: int) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        is_over = find_state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        assert not is_over or condition(), text_of_job(trial)
        assert time.monotonic() < deadline, text_of_job(trial)
        time.sleep(0.2)


def wait_for_end(trial: Trial, job: int) -> None:
    wait_until(lambda: find_state(job) == "COMPLETED", trial, job)
    assert find_exit_code(job) == 0


@pytest.fixture(scope="module")
def whole(cluster: Cluster, given: Given, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """PPO on two nodes, uninterrupted."""
    trial = make_trial(given, tmp_path_factory.mktemp("whole"), "ppo")
    wait_for_end(trial, submit(trial))
    return trial


def make_trial(given: Given, root: Path, experiment: str) -> Trial:
    return Trial(given=given, root=root, experiment=experiment, options=OPTIONS[experiment])


def test_a_job_of_two_nodes_trains(cluster, given, tmp_path):
    trial = make_trial(given, tmp_path, "sft")
    wait_for_end(trial, submit(trial))
    text = text_of_job(trial)
    assert "process 0 of 2 joined" in text and "process 1 of 2 joined" in text
    folder = trial.folder("logs").with_name("trial.slurm")
    assert sorted(path.name for path in (folder / "latest").iterdir()) == ["task-0.log", "task-1.log"]
    assert len(trial.steps()) == 13


def requeue(cluster: Cluster, job: int) -> None:
    cluster.run("scontrol", "requeue", str(job))


def kill_process(cluster: Cluster, job: int) -> None:
    find_process(cluster, NODES[1]).kill()


def find_process(cluster: Cluster, node: str) -> psutil.Process:
    (process,) = (task for task in cluster.find_tasks(node) if "ppo" in task.cmdline())
    return process


def lose_node(cluster: Cluster, job: int) -> None:
    cluster.kill_node(NODES[1])
    time.sleep(15)
    cluster.start_node(NODES[1])


@pytest.mark.parametrize("happen", [requeue, kill_process, lose_node])
def test_a_job_that_is_interrupted_ends_with_the_same_bits(happen, cluster, whole, given, tmp_path):
    trial = make_trial(given, tmp_path, "ppo")
    job = submit(trial)
    first = trial.folder("logs") / "run.log"
    wait_until(lambda: first.exists() and "(global step 5):" in first.read_text(), trial, job)
    happen(cluster, job)
    second: Path = trial.folder("logs").with_name("trial.slurm") / "attempt_2"
    wait_until(second.exists, trial, job)
    wait_for_end(trial, job)
    text = text_of_job(trial)
    assert "continuing after step" in text and (second.parent / "latest").resolve() == second.resolve()
    assert trial.steps() == whole.steps() == list(range(1, 13))
    for role in ROLES:
        assert not find_differing(trial.state(12, role), whole.state(12, role)), role
        assert not find_differing(trial.weights(12, role), whole.weights(12, role)), role
