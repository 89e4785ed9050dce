"""PPO on a real Ray of two nodes: an actor is killed, and the run goes on from its save and ends with the same bits."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.given.commands import Given, Trial
from tests.given.compare import find_differing
from tests.given.launched import is_over, started, wait_for_end, wait_for_text, wait_until
from tests.given.ray import needs_ray, ray_cluster

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    needs_ray,
    pytest.mark.filterwarnings("ignore"),  # Ray leaves files and sockets open
]
# Many, as they are quick, and what they print is some steps late: the actor must be killed before the last of them.
STEPS = 24
OPTIONS = {
    "n_nodes": 2,
    "n_gpus_per_node": 1,
    "allocation_mode": "d2p1m1",
    "total_train_epochs": 6,
    "save_freq_steps": 2,
    "recover_retries": 1,
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with room for one process on each node."""
    with ray_cluster(cpus_per_node=1) as address:
        yield address


def launch_words(trial: Trial, address: str) -> list[str]:
    flags = ["launch", "ray", "--address", address, "--no-gpus"]
    return ["-m", "realjax.apps.quickstart", *flags, "ppo", *trial.words()]


def find_worker(trial: Trial, number: int) -> psutil.Process:
    """Returns the run's process of that number, which an actor has started."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            is_of_trial = f"trial_name={trial.name}" in words and "launch" not in words
            if is_of_trial and process.environ().get("REALJAX_PROCESS_ID") == str(number):
                return process
    pytest.fail(f"no process {number} of {trial.name}")


def test_a_run_whose_actor_is_killed_ends_with_the_same_bits(address: str, given: Given, tmp_path: Path):
    whole, trial = (
        Trial(given=given, root=tmp_path, name=name, experiment="ppo", options=OPTIONS) for name in ("whole", "killed")
    )
    logs = {name: tmp_path / f"{name}.log" for name in ("whole", "killed")}
    with started(launch_words(whole, address), logs["whole"]) as launcher:
        assert wait_for_end(launcher, logs["whole"]) == 0, logs["whole"].read_text()
    with started(launch_words(trial, address), logs["killed"]) as launcher:
        wait_for_text("processes joined", launcher, logs["killed"])
        worker = find_worker(trial, 1)
        actor = worker.parent()
        assert actor is not None
        wait_for_text("(global step 3):", launcher, logs["killed"])
        actor.kill()
        wait_until(lambda: is_over(worker), launcher, logs["killed"])
        assert wait_for_end(launcher, logs["killed"]) == 0, logs["killed"].read_text()
    text = logs["killed"].read_text()
    for said in ("its actor is gone", "it is started again", "continuing after step "):
        assert said in text, text
    assert trial.steps() == whole.steps() == list(range(1, STEPS + 1))
    for role in ("actor", "critic"):
        assert not find_differing(trial.state(STEPS, role), whole.state(STEPS, role)), role
        assert not find_differing(trial.weights(STEPS, role), whole.weights(STEPS, role)), role
