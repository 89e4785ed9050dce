"""A model's score is read at each sequence's last token; a mix is the weighted sum of its parts."""

import numpy as np
import pytest

from realjax.core.host_call import HostResult
from realjax.core.metrics import summarize
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
        {"reward/model": scores.mean(), "reward/a": 1.0, "reward/b": 5.0}
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
