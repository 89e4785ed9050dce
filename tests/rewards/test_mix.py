"""A model's score is read at each sequence's last token; a mix is the weighted sum of its parts."""

import numpy as np
import pytest

from realjax.core.host_call import HostResult
from realjax.core.metrics import summarize
from realjax.rewards.failures import Failure, Failures
from realjax.rewards.mix import (
    MODEL_REWARD_INPUTS,
    RewardSource,
    make_model_reward,
    mix_rewards,
    mixed_inputs,
)
from tests.rewards.text_rollouts import pack_samples, places


def with_scores(arrays, seed=0):
    scores = np.random.default_rng(seed).standard_normal(arrays["tokens"].shape).astype(np.float32)
    return arrays | {"scores": scores}


def last_scores(arrays):
    segment_ids, scores = arrays["segment_ids"], arrays["scores"]
    return [scores[row, np.flatnonzero(segment_ids[row] == s + 1)[-1]] for row, s in places(segment_ids)]


@pytest.mark.parametrize("row_len", [28, 48, 200])
def test_the_score_of_the_last_token_is_shifted_then_scaled(row_len):
    arrays = with_scores(pack_samples(row_len=row_len))
    rewards = make_model_reward(scaling=0.5, bias=2.0)(arrays, {}).arrays["rewards"]
    where = places(arrays["segment_ids"])
    np.testing.assert_allclose([rewards[p] for p in where], (np.array(last_scores(arrays)) - 2) * 0.5, rtol=1e-6)
    # A bias does not turn up where there is no sequence.
    assert rewards.shape == arrays["has_eos"].shape and np.count_nonzero(rewards) == len(where)


def test_nothing_but_last_tokens_is_read():
    arrays = with_scores(pack_samples())
    expected = make_model_reward()(arrays, {}).arrays["rewards"]
    segment_ids, spoiled = arrays["segment_ids"], np.full_like(arrays["scores"], np.nan)
    for (row, s), score in zip(places(segment_ids), last_scores(arrays), strict=True):
        spoiled[row, np.flatnonzero(segment_ids[row] == s + 1)[-1]] = score
    found = make_model_reward()(arrays | {"scores": spoiled}, {}).arrays["rewards"]
    np.testing.assert_array_equal(found, expected)


def count_calls(arrays, state):
    """Rewards every sequence with the number of earlier calls."""
    num_calls = state.get("calls", 0.0)
    rewards = np.where(np.arange(arrays["has_eos"].shape[1]) < arrays["segment_ids"].max(axis=1)[:, None], num_calls, 0)
    return HostResult(arrays={"rewards": rewards.astype(np.float32)}, state={"calls": num_calls + 1})


def test_a_mix_is_the_weighted_sum_and_keeps_each_state():
    model = RewardSource(name="model", fn=make_model_reward(), inputs=MODEL_REWARD_INPUTS, weight=0.25)
    sources = [model, *(RewardSource(name=n, fn=count_calls, inputs=("has_eos",), weight=2.0) for n in ("a", "b"))]
    mix, arrays = mix_rewards(sources), with_scores(pack_samples())
    state: dict = {"a/calls": 1.0, "b/calls": 5.0}
    result = mix(arrays, state)
    scores = np.array(last_scores(arrays), np.float64)
    found = [result.arrays["rewards"][place] for place in places(arrays["segment_ids"])]
    np.testing.assert_allclose(found, 0.25 * scores + 2 * (1 + 5), rtol=1e-6)
    assert result.arrays["rewards"].dtype == np.float32
    assert result.state == {"a/calls": 2.0, "b/calls": 6.0}
    assert summarize([result.metrics]) == pytest.approx(
        {"reward/model": scores.mean(), "reward/a": 1.0, "reward/b": 5.0, "reward/failed": 0.0}
    )
    assert mixed_inputs(sources) == ("scores", "has_eos")


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_sources_have_names_of_their_own(names):
    with pytest.raises(ValueError, match="each with a name of its own"):
        mix_rewards([RewardSource(name=name, fn=count_calls, inputs=()) for name in names])


@pytest.mark.parametrize(("score", "weight"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, 1e300), (3e38, 2.0)])
def test_a_reward_that_is_not_finite_names_its_source(score, weight):
    arrays = pack_samples()
    arrays["scores"] = np.full(arrays["tokens"].shape, score, np.float32)
    fine = RewardSource(name="fine", fn=make_model_reward(scaling=0.0), inputs=MODEL_REWARD_INPUTS, weight=0.0)
    title = "role rew ('/models/judge')"
    model = RewardSource(name="m", fn=make_model_reward(), inputs=MODEL_REWARD_INPUTS, weight=weight, title=title)
    sources = (model, fine) if np.isfinite(score) else (model,)
    with pytest.raises(
        ValueError, match=r"^reward: role rew \('/models/judge'\) gave .* for 4 answers; a reward must be"
    ):
        mix_rewards(sources)(arrays, {})


def constant(values):
    """Returns a source of these rewards for the four answers, nan where it has none."""

    def fn(arrays, state):
        rewards = np.zeros(arrays["has_eos"].shape, np.float32)
        rewards[tuple(np.array(places(arrays["segment_ids"])).T)] = values
        return HostResult(arrays={"rewards": rewards})

    return fn


def test_an_answer_that_a_source_could_not_score_has_failed_and_no_mean_counts_it():
    arrays = pack_samples(row_len=200)
    arrays["env_failed"] = np.zeros(arrays["has_eos"].shape, bool)
    arrays["env_failed"][0, 3] = True
    sources = [
        RewardSource(name="a", fn=constant([1.0, np.nan, 3.0, 7.0]), inputs=(), weight=2.0, can_fail=True),
        RewardSource(name="b", fn=constant([1.0, 1.0, 0.0, np.nan]), inputs=()),
    ]
    result = mix_rewards(sources)(arrays, {})
    np.testing.assert_array_equal(result.arrays["rewards"][0, :4], [3, np.nan, 6, np.nan])
    np.testing.assert_array_equal(result.arrays["is_failed"][0, :4], [False, True, False, True])
    assert np.count_nonzero(result.arrays["is_failed"]) == 2
    assert summarize([result.metrics]) == pytest.approx({"reward/a": 2.0, "reward/b": 2 / 3, "reward/failed": 2.0})


def test_too_large_a_share_of_failed_answers_ends_the_run():
    failures = Failures()
    failures.tell("reward.fn m:f", [Failure(answer="so", row="row 4 (id q4)", reason="KeyError: 'x'")])
    source = RewardSource(name="a", fn=constant([1.0, np.nan, 3.0, 7.0]), inputs=(), can_fail=True)
    mix_rewards([source], max_failed_share=0.25, failures=failures)(pack_samples(), {})
    with pytest.raises(
        ValueError,
        match=r"^reward: 1 of 4 answers could not be scored, and reward.max_failed_share is 0.2 \(reward.fn m:f: "
        r"KeyError: 'x', for the answer 'so' to row 4 \(id q4\)\); mend",
    ):
        mix_rewards([source], max_failed_share=0.2, failures=failures)(pack_samples(), {})
