"""The first step of PPO: its ratios are 1 and its KL 0, whatever the layouts, and all of them give the same numbers."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from realjax.core.axes import train_rules
from realjax.core.layout import Layout, ParallelStrategy
from realjax.runtime.calls import put_batch
from realjax.runtime.executor import StepResult
from tests.given.compare import as_numbers
from tests.given.models import make_layout
from tests.given.runs import LAYOUTS, Given, build_rl_spec, load_executor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
STEPS = 2
MICRO_BATCHES = {
    "rew_inf.n_mbs": 2,
    "ref_inf.max_tokens_per_mb": 32,
    "actor_train.n_mbs": 2,
    "critic_train.max_tokens_per_mb": 32,
}
# Tensor parallelism beside data parallelism stands for that alone.
KINDS = [name for name in LAYOUTS if name != "tensor"]
CASES: dict[str, dict[str, Any]] = {name: LAYOUTS[name] for name in KINDS} | {
    "micro-batches": MICRO_BATCHES,
    "one minibatch": {"algo.ppo_n_minibatches": 1},
}


@pytest.fixture(scope="module")
def steps_of(given: Given, tmp_path_factory: pytest.TempPathFactory):
    """Returns `steps_of(case) -> the results of the first steps`, each run once."""
    root: Path = tmp_path_factory.mktemp("root")

    @cache
    def steps(case: str) -> tuple[StepResult, ...]:
        spec = build_rl_spec(given, root, **CASES[case])
        executor = load_executor(spec)
        return tuple(executor.step(spec.loader.batch(i), i) for i in range(STEPS))

    return steps


def test_every_key_of_a_step_is_placed_by_the_names_of_its_dims(steps_of):
    """On a table that splits time, and also where the key comes from another call's devices."""
    batch, layout = steps_of("halves")[0].batch, make_layout(dp=2, tp=2)
    elsewhere = Layout.of(ParallelStrategy(dp=2), jax.devices()[4:6]).sharding("data")
    results = {key: jax.device_put(batch[key], elsewhere) for key in ("values", "rewards", "kept")}
    placed = put_batch(batch.replace_arrays(**results), {**train_rules(layout.strategy), "time": "tensor"}, layout)
    per_segment = {"has_eos", "group", "prompt_id", "sample_id", "rewards", "seq_share", "is_failed"}
    assert per_segment < set(placed)
    for key, array in placed.arrays.items():
        expected = layout.sharding("data", None if key in per_segment else "tensor")
        assert array.sharding.is_equivalent_to(expected, array.ndim), key
        np.testing.assert_array_equal(array, batch[key])


@pytest.mark.parametrize("layout", KINDS)
def test_the_policy_that_is_trained_is_the_one_that_answered(layout, steps_of):
    """Before its first update of a step; so in the second step too, whose answers the trained actor gave."""
    first, second = steps_of(layout)
    for result in (first, second):
        update = as_numbers(result.metrics["actor_train"])[0]
        assert update["importance_weight"] == pytest.approx(1, abs=1e-5)
        assert update["approx_kl"] == pytest.approx(0, abs=1e-5)
        assert update["actor_clip_ratio"] == 0
        assert as_numbers(result.metrics["critic_train"])[0]["value_clip_ratio"] == 0
    kl = [as_numbers(result.metrics["advantages"])[0]["kl"] for result in (first, second)]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    # The actor has learned by then, so that none of this is for lack of change.
    assert abs(kl[1]) > 1e-3
    assert np.any(first.batch["kept"])


UNRECORDED = {"algo__gen__force_no_logits_mask": True, "algo__recompute_logprobs": True}
# Every draw from a part of the vocabulary, and how ratios stay those of one distribution.
RESTRICTED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, not recorded": (name, UNRECORDED) for name in ("ppo", "rloo", "remax")},
    "corrected": ("grpo", {"algo__recompute_logprobs": True, "algo__correction__kind": "tis"}),
    "greedy without end-of-text": ("ppo", {"algo__gen__greedy": True, "algo__gen__min_new_tokens": 6}),
}


@pytest.mark.parametrize("case", RESTRICTED)
def test_ratios_are_1_without_a_learning_rate(case, given, tmp_path):
    """In every update of a step, however tokens were drawn; and the KL to an equal reference is 0."""
    experiment, changes = RESTRICTED[case]
    still = {"actor__optimizer__lr": 0, "algo__surrogate": "clip", "algo__ppo_n_minibatches": 2}
    spec = build_rl_spec(given, tmp_path, experiment, **still, **changes)
    result = load_executor(spec).step(spec.loader.batch(0), 0)
    updates = as_numbers(result.metrics["actor_train"])
    assert len(updates) == 2
    for update in updates:
        assert update["importance_weight"] == pytest.approx(1, abs=1e-6)
        assert (update["actor_clip_ratio"], update["early_stop"]) == (0, 0)
        assert abs(update["approx_kl"]) < 1e-6
    assert as_numbers(result.metrics["advantages"])[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert ("corrections" in result.metrics) == (case == "corrected")
    if case == "corrected":
        (weights,) = as_numbers(result.metrics["corrections"])
        assert weights["correction_weight"] == pytest.approx(1, abs=1e-5) and weights["correction_cut"] == 0
        assert weights["correction_ess"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"algo__recompute_logprobs": True}, {"algo__gen__greedy": True}], ids=str)
def test_ratios_that_would_start_away_from_1_are_said(changes, given, tmp_path, caplog):
    build_rl_spec(given, tmp_path, algo__gen__force_no_logits_mask=True, **changes)
    assert ("start away from 1 and 0; leave it out, or set recompute_logprobs=True" in caplog.text) == (changes == {})


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("one device", "one minibatch")])
def test_layouts_and_micro_batches_change_nothing(case, steps_of):
    found, expected = steps_of(case)[0].metrics, steps_of("one device")[0].metrics
    assert list(found) == list(expected)
    for call in found:
        assert_same(found[call], expected[call])


def test_the_number_of_minibatches_changes_the_updates_alone(steps_of):
    found, expected = steps_of("one minibatch")[0].metrics, steps_of("one device")[0].metrics
    assert {call: len(updates) for call, updates in found.items()} == dict.fromkeys(expected, 1)
    assert [len(expected[call]) for call in ("actor_train", "critic_train")] == [4, 4]
    for call in ("rewards", "advantages"):
        assert_same(found[call], expected[call])


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Fails unless a call's updates have the same metrics, to what rounding may do to the first few of them."""
    for ours, theirs in zip(as_numbers(found), as_numbers(expected), strict=True):
        ours = {name: value for name, value in ours.items() if name != "bubble_share"}  # of a layout, not of its result
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)
