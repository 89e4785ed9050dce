"""Reinforcement learning in conversations as commands: rewards of turns, failed environments, and what is recorded."""

import numpy as np
import pytest

from tests.given.commands import Trial
from tests.given.environments import write_chat_models

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick")]


@pytest.fixture(scope="module")
def trial(given, tmp_path_factory) -> Trial:
    root = tmp_path_factory.mktemp("talks")
    options = {
        **write_chat_models(given, root),
        "rew.path": None,
        "rew.init_from_scratch": None,
        "env.path": "tests.given.environments:Chatty",
        "env.max_seqlen": 100,
        "algo.ppo_n_minibatches": 1,
        "max_steps": 2,
    }
    return Trial(given=given, root=root, experiment="grpo", options=options)


def test_conversations_are_learned_from_by_actor_and_critic(trial, given):
    changes = {"dataset.valid_path": given.held_out, "eval.greedy": False, "eval_freq_steps": 2}
    changes["critic.path"] = trial.options["actor.path"]
    own = Trial(given=given, root=trial.root, name="ppo", experiment="ppo", options=trial.options)
    assert own.run(**changes) == 0
    records = own.metrics("train")
    assert 1 < records[0]["turns"] <= records[0]["max_turns"] == 3 and records[0]["cut_off"] < records[0]["n_seqs"]
    for record in records:
        assert record["task_reward"] == pytest.approx(record["reward/environment"]) and record["task_reward"] > 0
        assert record["importance_weight"] == pytest.approx(1, abs=1e-4)
        assert record["reward/failed"] == record["retries"] == 0 and record["time/environment"] > 0
    values = own.metrics("eval")[0]
    assert values["sampled/turns"] > 1 and values["sampled/environment_failed"] == 0


def test_environments_that_fail_are_counted_and_nothing_is_learned_from_them(trial):
    changes = {"env.path": "tests.given.environments:Moody", "reward.max_failed_share": 0.9}
    moody = Trial(given=trial.given, root=trial.root, name="moody", experiment="grpo", options=trial.options)
    assert moody.run(**changes) == 0
    for record in moody.metrics("train"):
        assert record["reward/failed"] == record["environment_failed"] > 0
        assert record["retries"] == record["environment_failed"]
        assert record["n_seqs"] + record["reward/failed"] == 32 and np.isfinite(record["task_reward"])
        assert record["trained_seqs"] == record["n_seqs"]


def test_too_many_failures_end_the_run_with_a_message(trial, capsys):
    absent = Trial(given=trial.given, root=trial.root, name="absent", experiment="grpo", options=trial.options)
    assert absent.run(**{"env.path": "tests.given.environments:Absent"}) != 0
    told = "".join(capsys.readouterr())
    assert "of 32 conversations have failed" in told and "nobody is there" in told
    assert absent.steps() == []
