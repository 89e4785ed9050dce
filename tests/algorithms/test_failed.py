"""Answers without a reward: whatever stands in them, losses, gradients and measures are as if they were not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import grpo, ppo, reinforce_pp, remax, rloo
from realjax.algorithms.attempts import measure_attempts
from realjax.algorithms.groups import Groups
from realjax.algorithms.policy import make_policy_loss
from realjax.core.metrics import finalize, summarize
from realjax.dataflow.graph import Minibatches
from realjax.runtime.rollouts import make_minibatches
from tests.algorithms.rollout_cases import GROUPS, LENGTHS, Rollout, host_arrays, make_rollouts, poisoned
from tests.given.sequences import pack_in_order, unpack_array

FAILED = {1, 6, 8}  # 6 is the only answer to its prompt
ALGORITHMS = {
    "ppo": (ppo, ppo.PPOParameters(use_adaptive_kl_ctl=True)),
    "ppo of sequences": (ppo, ppo.PPOParameters(loss_aggregation="sequence", missing_eos_penalty=1.0)),
    "grpo": (grpo, grpo.GRPOParameters(loss_aggregation="sequence")),
    "dr grpo": (grpo, grpo.GRPOParameters(scale_by_std=False, loss_aggregation="constant", max_response_len=16)),
    "dapo": (grpo, grpo.GRPOParameters(drop_uniform_groups=True, kl_ctl=0.0, eps_clip_high=0.3)),
    "rloo": (rloo, rloo.RLOOParameters(adv_norm=True)),
    "remax": (remax, remax.ReMaxParameters(kl_ctl=0.2)),
    "reinforce++": (reinforce_pp, reinforce_pp.ReinforcePPParameters(use_baseline=True)),
}


def mark(rollouts: list[Rollout], failed: set[int]) -> list[Rollout]:
    """Returns the rollouts, of which some failed: numbers in them are garbage, and the last one never ended."""
    spoiled = ("rewards", "logprobs", "old_logprobs", "ref_logprobs", "values")
    return [
        r
        | {"is_failed": np.array(i in failed)}
        | ({k: np.full_like(r[k], np.nan) for k in spoiled} if i in failed else {})
        for i, r in enumerate(rollouts)
    ]


def learn(algorithm: str, rollouts: list[Rollout]):
    """Returns what a step learns from: the host call's result, its arrays by sequence, and of actor and critic loss and
    gradient by what stands at each token, by sequence.
    """
    module, parameters = ALGORITHMS[algorithm]
    batch, plan = pack_in_order(rollouts, 13, num_rows=12)
    result = module.make_advantages(parameters)(poisoned(host_arrays(batch)), {})
    batch = batch.with_arrays(**result.arrays)
    losses = [make_policy_loss(parameters)] + [ppo.make_critic_loss(parameters)] * (module is ppo)
    found = []
    for loss in losses:
        outputs = jnp.asarray(np.nan_to_num(batch["old_logprobs" if loss.head == "logprobs" else "values"]))

        def total(x, loss=loss):
            sums = loss.fn({loss.head: x}, batch)
            return sums.loss.sum / sums.loss.weight, finalize(sums.metrics)

        (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(outputs)
        found.append((float(value), unpack_array(gradient, plan), {k: float(v) for k, v in metrics.items()}))
    return result, {key: unpack_array(array, plan) for key, array in result.arrays.items()}, found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_batch_learns_as_it_would_without_them(algorithm):
    left = [i for i in range(len(LENGTHS)) if i not in FAILED]
    result, arrays, losses = learn(algorithm, mark(make_rollouts(), FAILED))
    whole = make_rollouts()
    expected_result, expected_arrays, expected_losses = learn(algorithm, [whole[i] for i in left])
    assert result.state == expected_result.state
    assert summarize([result.metrics]) == expected_summary(expected_result)
    for key, of_sequences in arrays.items():
        for i in FAILED:
            assert not of_sequences[i].any(), key
        for i, expected in zip(left, expected_arrays[key], strict=True):
            np.testing.assert_allclose(of_sequences[i], expected, rtol=1e-6, atol=1e-7)
    for (value, gradient, metrics), (value_2, gradient_2, metrics_2) in zip(losses, expected_losses, strict=True):
        assert np.isfinite(value) and value == pytest.approx(value_2, rel=1e-6)
        assert metrics == pytest.approx(metrics_2, rel=1e-6, abs=1e-7)
        assert any(one.any() for one in gradient) and not any(gradient[i].any() for i in FAILED)
        for i, expected in zip(left, gradient_2, strict=True):
            np.testing.assert_allclose(gradient[i], expected, rtol=1e-5, atol=1e-7)


def expected_summary(result):
    return pytest.approx(summarize([result.metrics]), rel=1e-9)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_in_which_all_failed_learns_nothing(algorithm):
    module, parameters = ALGORITHMS[algorithm]
    batch, _ = pack_in_order(mark(make_rollouts(), set(range(len(LENGTHS)))), 13, num_rows=12)
    result = module.make_advantages(parameters)(poisoned(host_arrays(batch)), {})
    assert not any(array.any() for array in result.arrays.values())
    assert summarize([result.metrics])["n_seqs"] == 0
    assert make_minibatches(batch.with_arrays(**result.arrays), Minibatches(), row_multiple=1, seed=(0,)) == []


def test_remax_leaves_out_prompts_whose_greedy_answer_failed():
    failed = {GROUPS.index(3)}
    left = [i for i in range(len(LENGTHS)) if GROUPS[i] != 3]
    _, arrays, losses = learn("remax", mark(make_rollouts(), failed))
    whole = make_rollouts()
    _, expected, expected_losses = learn("remax", [whole[i] for i in left])
    for i, advantages in zip(left, expected["advantages"], strict=True):
        np.testing.assert_allclose(arrays["advantages"][i], advantages, rtol=1e-6)
    assert losses[0][0] == pytest.approx(expected_losses[0][0], rel=1e-6)


def test_attempts_are_those_that_have_a_reward():
    """Two of four answers to the first prompt failed: nothing is known of pass@4 but by the second one."""
    exists, group = np.ones((2, 4), bool), np.array([[0] * 4, [1] * 4])
    is_failed = np.array([[True, False, False, True], [False] * 4])
    solved = np.array([[True, True, False, True], [False, False, False, True]])
    found = summarize([measure_attempts(solved, Groups.of(group, exists & ~is_failed), 4)])
    assert found == pytest.approx({"pass@1": (1 / 2 + 1 / 4) / 2, "pass@2": (1 + 1 / 2) / 2, "pass@4": 1.0})
