import logging

import numpy as np
import pytest

from realjax.algorithms.kl import KL_COEFFICIENT
from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import (
    clipped_scores,
    discounted_to_tokens,
    generalized_advantages,
    kl_penalty,
    rollout_metrics,
    whiten,
)
from realjax.core.metrics import summarize
from tests.algorithms.rollout_cases import LENGTHS, PACKINGS, host_arrays, make_rollouts, poisoned
from tests.given.sequences import unpack_array

ALL_PACKINGS = pytest.mark.parametrize("packing", PACKINGS)
RESPONSE_LENS = np.array([response for _, response in LENGTHS])


def packed(packing="short rows", rollouts=None):
    batch, plan = PACKINGS[packing].pack(rollouts or make_rollouts())
    arrays = host_arrays(batch)
    return Responses.of(arrays), arrays, plan


def plain_gae(rewards, values, goes_on, discount, gae_lambda):
    """Advantages and returns of one response; `values` are those before each action and after the last."""
    advantages = np.zeros(len(rewards))
    for t in range(len(rewards)):
        for k in range(t, len(rewards)):
            is_end = k == len(rewards) - 1 and not goes_on
            delta = rewards[k] + discount * (0 if is_end else values[k + 1]) - values[k]
            advantages[t] += (discount * gae_lambda) ** (k - t) * delta
    return advantages, advantages + values[:-1]


@ALL_PACKINGS
@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_gae_is_the_sum_of_discounted_errors_of_each_response(packing, discount, gae_lambda):
    rollouts = make_rollouts()
    responses, arrays, plan = packed(packing)
    rewards = np.random.default_rng(1).standard_normal(arrays["tokens"].shape)
    spoiled = poisoned(arrays)
    found = generalized_advantages(
        responses,
        np.where(arrays["loss_mask"], rewards, np.nan),
        spoiled["values"],
        ~arrays["has_eos"],
        discount=discount,
        gae_lambda=gae_lambda,
    )
    per_sequence = [unpack_array(array, plan) for array in (rewards, *found)]
    for (prompt_len, _), rollout, own_rewards, advantages, returns in zip(
        LENGTHS, rollouts, *per_sequence, strict=True
    ):
        values = rollout["values"][prompt_len - 1 :].astype(np.float64)
        expected = plain_gae(own_rewards[prompt_len:], values, not rollout["has_eos"], discount, gae_lambda)
        np.testing.assert_allclose(advantages[prompt_len:], expected[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(returns[prompt_len:], expected[1], rtol=1e-9, atol=1e-12)
        assert not advantages[:prompt_len].any() and not returns[:prompt_len].any()


def one_row(mask, has_eos):
    mask = np.array([mask], bool)
    arrays = {"segment_ids": np.ones(mask.shape, np.int32), "loss_mask": mask, "has_eos": np.array([[has_eos]])}
    return Responses.of(arrays)


def test_a_terminal_reward_of_1_returns_1_everywhere():
    responses = one_row([0, 0, 1, 1, 1], True)
    values = np.random.default_rng(0).standard_normal((1, 5))
    rewards = responses.place_last(np.ones((1, 1)))
    _, returns = generalized_advantages(responses, rewards, values, np.array([[False]]), discount=1, gae_lambda=1)
    np.testing.assert_allclose(returns, [[0, 0, 1, 1, 1]])


def test_a_cut_off_response_returns_its_last_value():
    responses = one_row([0, 0, 1, 1, 1], False)
    values = np.array([[7.0, 0.3, -0.2, 0.9, 0.4]])
    _, returns = generalized_advantages(
        responses, np.zeros((1, 5)), values, np.array([[True]]), discount=1, gae_lambda=1
    )
    np.testing.assert_allclose(returns, [[0, 0, 0.4, 0.4, 0.4]])


def test_tokens_between_parts_of_a_response_are_stepped_over():
    """The environment's words, say: the next action follows the last one as if nothing stood between."""
    rng = np.random.default_rng(2)
    mask = np.array([0, 1, 1, 0, 0, 1, 1])
    rewards, values = rng.standard_normal((2, 7))
    options = {"discount": 0.9, "gae_lambda": 0.8}
    found, _ = generalized_advantages(one_row(mask, True), rewards[None], values[None], np.array([[False]]), **options)
    actions = np.flatnonzero(mask)
    expected, _ = plain_gae(rewards[actions], np.append(values[actions - 1], np.nan), False, *options.values())
    np.testing.assert_allclose(found[0, actions], expected)


@ALL_PACKINGS
def test_a_sequences_number_reaches_its_tokens_and_only_them(packing):
    responses, arrays, plan = packed(packing)
    assert (responses.num_seqs, responses.num_tokens) == (len(LENGTHS), RESPONSE_LENS.sum())
    numbers = np.array(unpack_array(arrays["rewards"], plan), np.float64)
    for i, (prompt_len, response_len) in enumerate(LENGTHS):
        n = prompt_len + response_len
        spread = unpack_array(responses.spread(arrays["rewards"]), plan)[i]
        np.testing.assert_allclose(spread, np.full(n, numbers[i]))
        np.testing.assert_array_equal(
            unpack_array(responses.tokens_left(), plan)[i], [0] * prompt_len + list(range(response_len))[::-1]
        )
        placed = unpack_array(responses.place_last(arrays["rewards"]), plan)[i]
        assert placed.sum() == pytest.approx(numbers[i] if response_len else 0)
        assert not placed[:-1].any()
    spread_RT, is_padding = responses.spread(arrays["rewards"]), arrays["segment_ids"] == 0
    assert not spread_RT[is_padding].any()
    np.testing.assert_allclose(unpack_array(responses.sum(spread_RT), plan), numbers * RESPONSE_LENS, rtol=1e-6)
    np.testing.assert_array_equal(unpack_array(responses.lens, plan), RESPONSE_LENS)


def test_only_takes_other_sequences_out():
    responses, arrays, plan = packed()
    chosen = responses.only(arrays["has_eos"])
    ended = np.array([bool(rollout["has_eos"]) for rollout in make_rollouts()])
    np.testing.assert_array_equal(unpack_array(chosen.lens, plan), np.where(ended, RESPONSE_LENS, 0))
    assert (chosen.num_seqs, chosen.num_tokens) == (ended.sum(), RESPONSE_LENS[ended].sum())


@ALL_PACKINGS
def test_discounting_runs_back_from_the_last_token(packing):
    responses, arrays, plan = packed(packing)
    found = unpack_array(discounted_to_tokens(responses, arrays["rewards"], 0.9), plan)
    for (prompt_len, response_len), rollout, tokens in zip(LENGTHS, make_rollouts(), found, strict=True):
        expected = [rollout["rewards"] * 0.9 ** (response_len - 1 - t) for t in range(response_len)]
        np.testing.assert_allclose(tokens, [0.0] * prompt_len + expected, rtol=1e-6)


def test_whitening_has_mean_0_and_std_1_over_the_mask_whatever_stands_elsewhere():
    rng = np.random.default_rng(0)
    mask = rng.random((4, 9)) < 0.6
    values = np.where(mask, rng.normal(3, 5, mask.shape), np.nan)
    found = whiten(values, mask)
    assert found[mask].mean() == pytest.approx(0, abs=1e-12)
    assert found[mask].std() == pytest.approx(values[mask].std() / (values[mask].std() + 1e-5), rel=1e-12)
    assert not found[~mask].any()
    assert not whiten(values, np.zeros(mask.shape, bool)).any()


def test_scores_are_clipped_before_the_penalty_of_being_cut_off():
    _, arrays, plan = packed()
    found = unpack_array(clipped_scores(arrays, PolicyParameters(max_reward_clip=1.5, missing_eos_penalty=4.0)), plan)
    for rollout, score in zip(make_rollouts(), found, strict=True):
        assert score == pytest.approx(np.clip(rollout["rewards"], -1.5, 1.5) - (0 if rollout["has_eos"] else 4))


@ALL_PACKINGS
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_and_its_controller(packing, estimator):
    responses, arrays, plan = packed(packing)
    parameters = PolicyParameters(kl_estimator=estimator, use_adaptive_kl_ctl=True, adaptive_kl_target=0.5)
    penalty = kl_penalty(poisoned(arrays), {KL_COEFFICIENT: 0.2}, responses, parameters)
    metrics, gaps, sums = summarize([penalty.metrics]), [], []
    for rollout, rewards in zip(make_rollouts(), unpack_array(penalty.rewards, plan), strict=True):
        mask = rollout["loss_mask"]
        d = rollout["logprobs"][mask].astype(np.float64) - rollout["ref_logprobs"][mask]
        expected = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[estimator]
        np.testing.assert_allclose(rewards[mask], -0.2 * expected, rtol=1e-9)
        assert not rewards[~mask].any()
        gaps.extend(d)
        sums.append(d.sum())
    assert metrics["kl"] == pytest.approx(np.mean(gaps), rel=1e-9)
    assert metrics["kl_per_response"] == pytest.approx(np.mean(sums), rel=1e-9)
    assert metrics["kl_reward"] == pytest.approx(penalty.rewards[arrays["loss_mask"]].mean(), rel=1e-9)
    # Nats per response, as the source of the controller and of its target's default has them.
    error = np.clip(np.mean(sums) / 0.5 - 1, -0.2, 0.2)
    assert error != np.clip(np.mean(gaps) / 0.5 - 1, -0.2, 0.2)
    assert penalty.state == {KL_COEFFICIENT: pytest.approx(0.2 * (1 + error * len(LENGTHS) / 10000), rel=1e-12)}


def test_the_controller_steers_an_actor_to_its_target():
    """An actor that drifts 3 nats a response is pulled back no more, one that drifts 12 is pulled back harder."""
    parameters = PolicyParameters(use_adaptive_kl_ctl=True, adaptive_kl_horizon=10.0)
    responses, arrays, _ = packed()
    lens = responses.spread(responses.lens)
    moves = {}
    for drift in (3.0, 6.0, 12.0):
        # The empty response has no tokens to drift in.
        num_full = int((responses.lens[responses.exists] > 0).sum())
        per_token = drift / np.maximum(lens, 1) * len(LENGTHS) / num_full
        state = kl_penalty(arrays | {"ref_logprobs": arrays["logprobs"] - per_token}, {}, responses, parameters).state
        moves[drift] = state[KL_COEFFICIENT] / 0.1 - 1
    assert moves == pytest.approx({3.0: -0.2, 6.0: 0.0, 12.0: 0.2}, abs=1e-6)


def test_the_coefficient_of_an_older_save_is_not_taken_over(caplog):
    """It was steered by the mean KL per token, far below any target, and had only fallen."""
    responses, arrays, _ = packed()
    parameters = PolicyParameters(use_adaptive_kl_ctl=True)
    with caplog.at_level(logging.WARNING):
        penalty = kl_penalty(arrays, {"kl_coef": 0.0006}, responses, parameters)
    assert "steered by the KL per token, not per response; it starts again from kl_ctl=0.1" in caplog.text
    assert summarize([penalty.metrics])["kl_coef"] == 0.1 and set(penalty.state) == {KL_COEFFICIENT}


def test_a_fixed_coefficient_keeps_no_state_and_none_needs_no_reference():
    responses, arrays, _ = packed()
    penalty = kl_penalty(arrays, {KL_COEFFICIENT: 9.0}, responses, PolicyParameters())
    assert summarize([penalty.metrics])["kl_coef"] == 0.1
    assert kl_penalty(arrays, {}, responses, PolicyParameters()).state == {}
    in_loss = kl_penalty(arrays, {}, responses, PolicyParameters(kl_in="loss"))
    assert not in_loss.rewards.any() and summarize([in_loss.metrics])["kl"] != 0
    del arrays["ref_logprobs"]
    assert not kl_penalty(arrays, {}, responses, PolicyParameters(kl_ctl=0)).rewards.any()


@ALL_PACKINGS
def test_metrics_are_those_of_the_sequences(packing):
    rollouts = make_rollouts()
    responses, arrays, _ = packed(packing)
    rewards = np.array([rollout["rewards"] for rollout in rollouts], np.float64)
    sampled = np.concatenate([rollout["logprobs"][rollout["loss_mask"]] for rollout in rollouts])
    gaps = np.concatenate([(r["old_logprobs"] - r["logprobs"])[r["loss_mask"]] for r in rollouts])
    found = rollout_metrics(poisoned(arrays), responses, PolicyParameters(recompute_logprobs=True))
    assert summarize([found]) == pytest.approx(
        {
            "task_reward": rewards.mean(),
            "task_reward_std": rewards.std(),
            "avg_seq_len": np.mean([sum(lens) for lens in LENGTHS]),
            "avg_prompt_len": np.mean([prompt for prompt, _ in LENGTHS]),
            "avg_response_len": RESPONSE_LENS.mean(),
            "std_response_len": RESPONSE_LENS.std(),
            "min_response_len": RESPONSE_LENS.min(),
            "max_response_len": RESPONSE_LENS.max(),
            "eos_share": np.mean([r["has_eos"] for r in rollouts]),
            "entropy_estimate": -sampled.mean(),
            "n_tokens": RESPONSE_LENS.sum(),
            "n_seqs": len(LENGTHS),
            "sampler_error": np.exp(np.abs(gaps)).mean(),
        },
        rel=1e-6,
    )
