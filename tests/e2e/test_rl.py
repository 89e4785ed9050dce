"""Whole commands of PPO, GRPO, RLOO and ReMax: what they log, keep and save, and how they go on after a stop."""

import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.given.commands import Trial, stopped_after
from tests.given.compare import find_differing, without_clocks
from tests.given.runs import LAYOUTS, Given

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
STEPS = 4  # 32 prompts, 8 at a time
PARTS = {
    **LAYOUTS["halves"],
    "recover_mode": "auto",
    "algo.use_adaptive_kl_ctl": True,
    "algo.adaptive_kl_target": 0.05,
    "algo.adaptive_kl_horizon": 100,
    "algo.ref_ema_eta": 0.1,
    "algo.ppo_epochs": 2,
    "reward.fn": "tests.given.rewards:shortness",
    "reward.fn_weight": 2.0,
    "reward.model_weight": 0.5,
    "eval_freq_steps": 2,
    "eval.best_metric": "greedy/task_reward",
}


@pytest.fixture
def trial(given: Given, tmp_path: Path) -> Trial:
    return Trial(given=given, root=tmp_path, experiment="ppo")


@pytest.fixture(scope="module")
def whole(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A run with everything that goes from step to step: statistics, a controller, an averaged reference."""
    trial = Trial(
        given=given,
        root=tmp_path_factory.mktemp("whole"),
        name="whole",
        experiment="ppo",
        options=PARTS | {"dataset.valid_path": given.held_out},
    )
    with (trial.root / "output").open("w") as file, redirect_stdout(file):
        assert trial.run() == 0
    return trial


def test_rewards_are_the_weighted_sum_of_their_sources(whole):
    records = whole.metrics("train")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        expected = 0.5 * record["reward/model"] + 2.0 * record["reward/fn"]
        assert record["task_reward"] == pytest.approx(expected, rel=1e-5)
        assert record["reward/model"] and record["reward/fn"] < 0
        # Totals are of all updates of a step: two passes over its tokens.
        for call in ("actor_train", "critic_train"):
            assert record[f"{call}/n_tokens"] == 2 * record["advantages/n_tokens"]
    assert len({record["kl_coef"] for record in records}) == STEPS


def test_held_out_answers_are_scored_and_the_best_actor_is_kept(whole):
    evaluations = whole.metrics("eval")
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    for record in evaluations:
        assert {"greedy/task_reward", "sampled/task_reward", "greedy/reward/fn"} <= record.keys()
        assert record["greedy/n_seqs"] == 6
    best = max(evaluations[1:], key=lambda record: record["greedy/task_reward"])["step"]
    (kept,) = (whole.folder("checkpoints") / "actor").glob("best-*")
    assert kept.name == f"best-globalstep{best}"
    text = (whole.folder("logs") / "report.html").read_text()
    assert "Samples on held-out prompts" in text and "after step 0" in text and f"after step {STEPS}" in text
    first_prompt = json.loads(whole.given.held_out.read_text().splitlines()[0])["prompt"]
    assert first_prompt in text


def test_calls_are_logged_with_their_layouts_and_moves(whole):
    output = (whole.root / "output").read_text()
    for line in (
        r"actor_gen +d4p1m1 on 0-3 +actor from its home d1p1m2\+zero2 on 0-1",
        r"ref_inf +d1p1m2 on 0-1 +ref from host memory",
        r"rew_inf +d2p1m1 on 2-3 +rew from host memory",
        r"critic_inf +d1p1m4 on 0-3 +critic from its home d2p1m1\+zero2 on 2-3",
        r"actor_train +d1p1m2\+zero2 on 0-1 +actor at home",
        r"critic_train +d2p1m1\+zero2 on 2-3 +critic at home",
    ):
        assert re.search(line, output), line
    record = whole.metrics("train")[-1]
    assert all(record[f"moved_mib/{call}"] > 0 for call in ("actor_gen", "ref_inf", "rew_inf", "critic_inf"))


def test_a_stopped_run_ends_like_one_that_was_not(whole):
    trial = replace(whole, name="stopped")
    with stopped_after(2):
        assert trial.run() == 143
    assert trial.steps() == [1, 2]
    assert trial.run() == 0
    assert without_clocks(trial.metrics(), "memory_mib") == without_clocks(whole.metrics(), "memory_mib")
    for role in ("actor", "critic", "ref"):
        assert not find_differing(trial.weights(STEPS, role), whole.weights(STEPS, role)), role
        assert not find_differing(trial.state(STEPS, role), whole.state(STEPS, role)), role
    counters = [json.loads((t.folder("recover") / str(STEPS) / "run" / "metadata").read_text()) for t in (trial, whole)]
    names = [state["counters"]["identity"]["harmless"].pop("trial_name") for state in counters]
    assert names == ["stopped", "whole"]
    assert counters[0] == counters[1]
    state = counters[0]["counters"]["controls"]["advantages"]
    assert {"kl_coefficient", "value_mean", "value_mean_square", "value_weight"} == state.keys()


def test_nothing_moves_without_a_learning_rate(trial):
    changes = {"actor.optimizer.lr": 0, "critic.optimizer.lr": 0, "algo.recompute_logprobs": True}
    with stopped_after(2):
        assert trial.run(**changes, save_freq_steps=2) == 143
    for record in trial.metrics("train"):
        assert record["importance_weight"] == pytest.approx(1, abs=1e-6)
        assert record["sampler_error"] == pytest.approx(1, abs=1e-5)
        assert record["kl"] == pytest.approx(0, abs=1e-5)
        assert record["actor_clip_ratio"] == 0
    before, after = load_file(trial.given.actor / "model.safetensors"), trial.weights(2, "actor")
    assert not find_differing(after, before)


def test_groups_that_teach_nothing_make_no_update(trial):
    """And a run of only such steps, whose answers all hit the limit, goes on to its end."""
    trial = replace(trial, experiment="grpo")
    changes = {
        "rew.path": None,
        "rew.init_from_scratch": None,
        "reward.fn": "tests.given.rewards:sameness",
        "group_size": 2,
        "algo.kl_ctl": 0,
        "algo.drop_uniform_groups": True,
        "algo.gen.min_new_tokens": 8,
        "algo.ppo_n_minibatches": 1,
    }
    with stopped_after(2):
        assert trial.run(**changes, save_freq_steps=2) == 143
    records = trial.metrics("train")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert record["eos_share"] == 0 and record["avg_response_len"] == record["min_response_len"] == 8
        assert record["uniform_group_share"] == 1 and record["trained_seqs"] == 0
        assert "actor_loss" not in record
    before, after = load_file(trial.given.actor / "model.safetensors"), trial.weights(2, "actor")
    assert not find_differing(after, before)


@pytest.mark.parametrize("experiment", ["rloo", "remax", "reinforce_pp"])
def test_answers_of_one_token(experiment, trial):
    trial = replace(trial, experiment=experiment)
    changes = {"algo.gen.max_new_tokens": 1, "algo.max_response_len": 1}
    with stopped_after(2):
        assert trial.run(**changes, save_freq_steps=2) == 143
    for record in trial.metrics("train"):
        assert record["avg_response_len"] == record["max_response_len"] == 1
        assert all(np.isfinite(value) for name, value in record.items() if isinstance(value, float)), record
        assert record["grad_norm"] > 0
