"""Reinforcement learning in conversations as commands: rewards of turns, failed environments, and what is recorded."""

import numpy as np
import pytest

from tests.given.commands import Trial, stopped_after
from tests.given.compare import relative_errors
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


@pytest.mark.slow
def test_a_run_that_continues_with_conversations_under_way_ends_as_one_that_did_not_stop(trial):
    """To the last bits of log-probabilities, which depend on the rows beside a row, and so on environments' haste."""
    options = trial.options | {"recover_mode": "auto", "max_steps": 4, "staleness": 2, "algo.gen.num_slots": 8}
    whole, stopped = (
        Trial(given=trial.given, root=trial.root, name=name, experiment="grpo", options=options)
        for name in ("whole", "stopped")
    )
    assert whole.run() == 0
    with stopped_after(2):
        assert stopped.run() == 143
    assert stopped.run() == 0
    found, expected = (
        np.array([[record[name] for name in ("turns", "n_seqs", "task_reward")] for record in one.metrics("train")])
        for one in (stopped, whole)
    )
    assert found == pytest.approx(expected) and len(found) == 4
    assert max(relative_errors(stopped.weights(4, "actor"), whole.weights(4, "actor")).values()) <= 1e-4
