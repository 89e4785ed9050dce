"""Conversations in every kind of run: drawn ahead, drawn again, with a greedy baseline, with experts replayed."""

from typing import Any

import numpy as np
import pytest

from realjax.data.packing import unpack
from realjax.runtime.ahead import Ahead
from realjax.runtime.executor import Executor, StepResult
from realjax.runtime.flight import flatten_rows, join_rows
from tests.given.compare import as_numbers
from tests.given.environments import write_chat_models
from tests.given.runs import build_rl_spec, load_executor

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 4  # 32 prompts, 8 at a time
OPTIONS: dict[str, Any] = {
    "rew__path": None,
    "rew__init_from_scratch": None,
    "env__path": "tests.given.environments:Chatty",
    "env__max_seqlen": 60,
    "algo__gen__num_slots": 8,
    "algo__ppo_n_minibatches": 1,
    "group_size": 2,
}
STILL = {"actor__optimizer__lr": 0, "algo__kl_ctl": 0}


@pytest.fixture(scope="module")
def make_run(given, tmp_path_factory):
    root = tmp_path_factory.mktemp("talks")
    models = {name.replace(".", "__"): path for name, path in write_chat_models(given, root).items()}

    def make(experiment: str = "grpo", **changes: Any) -> Executor:
        return load_executor(build_rl_spec(given, root, experiment, **models | OPTIONS | changes))

    return make


def take_steps(executor: Executor, first: int = 0) -> list[StepResult]:
    ahead = Ahead(executor, executor.plan.loader, STEPS)
    return [ahead.step(step) for step in range(first, STEPS)]


def list_talks(result: StepResult) -> list[tuple]:
    """Returns what conversations consist of, in an order of their own."""
    return sorted(
        (one["tokens"].tolist(), one["loss_mask"].tolist(), one["turn_rewards"].tolist(), int(one["num_turns"]))
        for one in unpack(result.batch.replace_arrays(**{key: np.asarray(result.batch[key]) for key in result.batch}))
    )


def test_without_a_learning_rate_age_changes_nothing_and_rows_in_flight_go_on_elsewhere(make_run):
    sync = make_run(**STILL)
    expected = [list_talks(sync.step(sync.plan.loader.batch(step), step)) for step in range(STEPS)]
    executor = make_run(staleness=3, **STILL)
    ahead = Ahead(executor, executor.plan.loader, STEPS)
    results = [ahead.step(0), ahead.step(1)]
    arrays = flatten_rows(executor.rows)
    assert any(row.generation is None and row.dialogue is not None for row in executor.rows)
    results += [ahead.step(2), ahead.step(3)]
    assert [list_talks(result) for result in results] == expected
    assert max(number for _, _, _, number in expected[0]) > 1
    for result in results:
        weights = as_numbers(list(result.metrics["corrections"]))[0]
        assert weights["correction_weight"] == pytest.approx(1, abs=1e-5) and weights["correction_cut"] == 0
    ages = [as_numbers(list(result.metrics["ages"]))[0] for result in results]
    assert max(age["max_token_age"] for age in ages) == 2 and max(age["interrupted_share"] for age in ages) > 0
    # A run that continues has the rows, and no environment of before.
    continued = make_run(staleness=3, **STILL)
    continued.rows = join_rows(arrays)
    assert [list_talks(result) for result in take_steps(continued, first=2)] == expected[2:]


def test_prompts_are_drawn_again_until_conversations_differ(make_run):
    options = {"env__path": "tests.given.environments:Coin", "algo__max_draws": 12, "algo__drop_uniform_groups": True}
    executor = make_run(**options, **STILL)
    result = executor.step(executor.plan.loader.batch(0), 0)
    by_group: dict[int, set[float]] = {}
    for one in unpack(result.batch.replace_arrays(**{key: np.asarray(result.batch[key]) for key in result.batch})):
        by_group.setdefault(int(one["group"]), set()).add(float(one["turn_rewards"].sum()))
    assert len(by_group) == 8 and all(rewards == {0.0, 1.0} for rewards in by_group.values())
    (sampled,) = as_numbers(list(result.metrics["dynamic_sampling"]))
    assert sampled["draws"] > 1 and sampled["drawn_prompts"] > 8


def test_a_greedy_conversation_is_the_baseline(make_run):
    executor = make_run("remax", group_size=None, algo__discount=1.0, **STILL)
    result = executor.step(executor.plan.loader.batch(0), 0)
    batch = result.batch.replace_arrays(**{key: np.asarray(result.batch[key]) for key in result.batch})
    worth: dict[int, dict[bool, float]] = {}
    for one in unpack(batch):
        worth.setdefault(int(one["group"]), {})[bool(one["is_baseline"])] = float(one["turn_rewards"].sum())
    for one in unpack(batch):
        rewards = worth[int(one["group"])]
        if bool(one["is_baseline"]):
            assert not one["train_mask"].any()
        else:
            learned = one["advantages"][one["loss_mask"]]
            np.testing.assert_allclose(learned, rewards[False] - rewards[True], rtol=0, atol=1e-5)
