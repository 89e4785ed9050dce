"""PPO as a job of a real Slurm of two nodes: back into the queue, then a process is killed, then a node is lost."""

import re
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from realjax.launch.slurm import find_exit_code, find_state
from tests.given.commands import Trial
from tests.given.compare import find_differing
from tests.given.processes import HANG_SECONDS, ROOT
from tests.given.slurm import NODES, Cluster, slurm_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
STEPS = 12  # 32 prompts, 16 at a time, six times
OPTIONS = {
    "mode": "slurm",
    "n_nodes": 2,
    "n_gpus_per_node": 4,
    "allocation_mode": "d8p1m1",
    "dataset.train_bs_n_seqs": 16,
    "algo.ppo_n_minibatches": 2,
    "total_train_epochs": 6,
    "save_freq_steps": 2,
    "recover_retries": 3,
}


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
    command = [sys.executable, "-m", "realjax.apps.quickstart", "launch", "slurm", "--no-gpus", "ppo", *trial.words()]
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


def test_a_job_that_is_interrupted_three_times_ends_with_the_same_bits(cluster, given, tmp_path):
    whole, trial = (
        Trial(given=given, root=tmp_path / name, experiment="ppo", options=OPTIONS) for name in ("whole", "interrupted")
    )
    wait_for_end(whole, submit(whole))
    job, folder = submit(trial), trial.folder("logs").with_name("trial.slurm")
    for number, happen in enumerate((requeue, kill_process, lose_node), start=1):
        log = folder / f"attempt_{number}" / "task-0.log"
        step = f"(global step {3 * number}):"
        wait_until(lambda: log.exists() and step in log.read_text(), trial, job)  # noqa: B023
        happen(cluster, job)
        wait_until((folder / f"attempt_{number + 1}").exists, trial, job)
    wait_for_end(trial, job)
    attempts = sorted(folder.glob("attempt_*"))
    assert len(attempts) == 4 and (folder / "latest").resolve() == attempts[-1].resolve()
    assert all(sorted(path.name for path in attempt.iterdir()) == ["task-0.log", "task-1.log"] for attempt in attempts)
    texts = [(attempt / "task-0.log").read_text() for attempt in attempts]
    assert "2 processes joined" in texts[0] and all("continuing after step" in text for text in texts[1:])
    assert trial.steps() == whole.steps() == list(range(1, STEPS + 1))
    for role in ("actor", "critic"):
        assert not find_differing(trial.state(STEPS, role), whole.state(STEPS, role)), role
        assert not find_differing(trial.weights(STEPS, role), whole.weights(STEPS, role)), role
