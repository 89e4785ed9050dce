"""PPO in two processes, actor and critic trained in different ones: the numbers of one process."""

import re
from dataclasses import replace

import pytest

from tests.e2e.test_processes import launch_words, started
from tests.given.commands import Trial
from tests.given.compare import relative_errors, without_clocks
from tests.given.processes import HANG_SECONDS

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("quick")]
STEPS = 2  # 32 prompts, 16 at a time
# Of eight devices process 0 has the first four; answers are drawn on all of them.
OPTIONS = {
    "n_gpus_per_node": 8,
    "allocation_mode": "manual",
    "actor_gen.parallel.data_parallel_size": 8,
    "ref_inf.parallel.data_parallel_size": 4,
    "ref_inf.parallel.model_parallel_size": 2,
    "rew_inf.parallel.data_parallel_size": 4,
    "rew_inf.device_mesh": "NODE01:2,3,4,5",
    "critic_inf.parallel.data_parallel_size": 4,
    "critic_inf.device_mesh": "NODE01:0,1,2,3",
    "actor_train.parallel.data_parallel_size": 2,
    "actor_train.parallel.model_parallel_size": 2,
    "actor_train.device_mesh": "NODE01:0,1,2,3",
    "critic_train.parallel.data_parallel_size": 4,
    "critic_train.device_mesh": "NODE01:4,5,6,7",
    "algo.ppo_n_minibatches": 2,
    "algo.ref_ema_eta": 0.1,
    "reward.fn": "tests.given.rewards:shortness",
    "dataset.train_bs_n_seqs": 16,
}


def test_two_processes_do_what_one_does(given, tmp_path):
    alone = Trial(given=given, root=tmp_path, name="alone", experiment="ppo", options=OPTIONS)
    assert alone.run() == 0
    both, log = replace(alone, name="both"), tmp_path / "both.log"
    with started(launch_words(both.words(), experiment="ppo"), log) as process:
        assert process.wait(HANG_SECONDS) == 0, log.read_text()
    output = log.read_text()
    assert "2 processes joined" in output
    assert len(re.findall(r"\(global step \d\):", output)) == STEPS
    found, expected = (without_clocks(trial.metrics(), "memory_mib") for trial in (both, alone))
    assert [list(record) for record in found] == [list(record) for record in expected]
    for ours, theirs in zip(found, expected):
        assert ours == {k: x if isinstance(x, str) else pytest.approx(x, rel=1e-3, abs=1e-4) for k, x in theirs.items()}
    for role in ("actor", "critic", "ref"):
        errors = relative_errors(both.weights(STEPS, role), alone.weights(STEPS, role))
        assert max(errors.values()) <= 1e-4, (role, errors)
