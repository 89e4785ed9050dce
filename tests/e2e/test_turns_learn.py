"""A policy learns what each turn of a conversation wants: opposite things, and where the last one alone pays."""

import numpy as np
import pytest

from tests.given.commands import Trial
from tests.given.environments import write_chat_models

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("quick")]
STEPS, NUM_SEEN = 24, 4


@pytest.mark.parametrize(("experiment", "environment"), [("ppo", "PaysLast"), ("grpo", "PaysBoth")])
def test_two_turns_are_learned(given, tmp_path, experiment, environment):
    is_ppo = experiment == "ppo"
    models = {**write_chat_models(given, tmp_path), "ref.path": None, "rew.path": None, "rew.init_from_scratch": None}
    options = {
        **models,
        **({"critic.path": tmp_path / "actor", "critic.optimizer.lr": 0.003} if is_ppo else {}),
        "actor.optimizer.lr": 0.003,
        "env.path": f"tests.given.environments:{environment}",
        "env.max_seqlen": 64,
        "dataset.train_bs_n_seqs": 32 if is_ppo else 8,
        "total_train_epochs": STEPS,
        "max_steps": STEPS,
        # What is cut off is worth what it has earned: no value of the critic's makes it worth more.
        "algo.missing_eos_penalty": 0.0,
        "algo.kl_ctl": 0.0,
        "algo.gen.top_k": 320,
        "algo.gen.top_p": 1.0,
        "algo.gen.temperature": 1.0,
    }
    trial = Trial(given=given, root=tmp_path, experiment=experiment, options=options)
    assert trial.run() == 0
    rewards = [record["task_reward"] for record in trial.metrics("train")]
    assert len(rewards) == STEPS
    assert np.mean(rewards[-NUM_SEEN:]) > np.mean(rewards[:NUM_SEEN]) + 0.4
