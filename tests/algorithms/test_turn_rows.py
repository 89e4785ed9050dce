"""Advantages of rows in turns are those of loops over what was sampled: what an environment said is stepped over."""

import numpy as np
import pytest

from realjax.algorithms import grpo, ppo, reinforce_pp, rloo
from tests.algorithms.test_returns import plain_gae
from tests.given.sequences import pack_in_order, unpack_array

GROUPS = (0, 0, 1, 0, 1, 1)
# Of each row: the prompt's tokens, then in turn those of an answer and of what was said to it.
SHAPES = ((3, 4, 2, 3), (2, 1, 1, 1, 3, 2), (4, 5), (1, 2, 4, 1), (2, 3, 1, 2), (3, 2))
CUT_OFF, FAILED = (3,), (4,)


def make_rows() -> list[dict[str, np.ndarray]]:
    rng, rows = np.random.default_rng(0), []
    for i, shape in enumerate(SHAPES):
        mask = np.concatenate([np.full(n, k % 2 == 1) for k, n in enumerate(shape)])
        normal = lambda scale, like=mask: (rng.standard_normal(len(like)) * scale).astype(np.float32)
        logprobs, given = -np.abs(normal(1.0)) * mask, np.zeros(len(mask), np.float32)
        ends = np.flatnonzero(mask & ~np.append(mask[1:], False))
        given[ends] = rng.normal(size=len(ends))
        extra = rng.normal()  # of another source of rewards
        rows.append(
            {
                "tokens": rng.integers(1, 90, len(mask), dtype=np.int32),
                "loss_mask": mask,
                "logprobs": logprobs,
                "ref_logprobs": np.where(mask, logprobs + normal(0.3), np.nan).astype(np.float32),
                "values": normal(1.0),
                "turn_rewards": given,
                "rewards": np.float32(np.nan if i in FAILED else given.sum() + extra),
                "is_failed": np.array(i in FAILED),
                "has_eos": np.array(i not in (*CUT_OFF, *FAILED)),
                "group": np.int32(GROUPS[i]),
            }
        )
    return rows


def run(fn, rows, row_len: int = 16):
    """Returns `advantages`, `train_mask` and `returns`, where there are any, of each row."""
    batch, plan = pack_in_order(rows, row_len, num_rows=6)
    arrays = fn({key: np.asarray(batch[key]) for key in batch}, {}).arrays
    return {key: unpack_array(arrays[key], plan) for key in ("advantages", "train_mask", "returns") if key in arrays}


def compacted_gae(row, p, *, keeps_values: bool, score: float):
    """Returns advantages of the sampled tokens alone, in a row without what was said between them.

    `score` is what the whole row is worth; each turn's part of it stands at its end.
    """
    mask, given = row["loss_mask"], row["turn_rewards"].astype(np.float64)
    at = np.flatnonzero(mask)
    rewards = given[at] - p.kl_ctl * (row["logprobs"] - row["ref_logprobs"])[at].astype(np.float64)
    goes_on = keeps_values and not row["has_eos"] and p.missing_eos_penalty is None
    if not goes_on:
        rewards[-1] += score - given.sum()
    read = row["values"].astype(np.float64) * keeps_values
    values = np.append(read[at - 1], read[at[-1]])
    return plain_gae(rewards, values, goes_on, p.discount, p.gae_lambda if keeps_values else 1.0)


@pytest.mark.parametrize("row_len", [16, 80])
@pytest.mark.parametrize("penalty", [None, 0.7])
def test_gae_is_that_of_the_sampled_tokens_with_each_turns_reward_at_its_end(row_len, penalty):
    rows = make_rows()
    p = ppo.PPOParameters(
        discount=0.9, gae_lambda=0.8, adv_norm=False, value_norm=False, missing_eos_penalty=penalty, kl_ctl=0.2
    )
    found = run(ppo.make_advantages(p), rows, row_len)
    for i, row in enumerate(rows):
        mask = row["loss_mask"]
        if i in FAILED:
            assert not found["train_mask"][i].any() and not found["advantages"][i].any()
            continue
        score = float(row["rewards"]) - (0 if row["has_eos"] or penalty is None else penalty)
        advantages, returns = compacted_gae(row, p, keeps_values=True, score=score)
        np.testing.assert_allclose(found["advantages"][i][mask], advantages, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["returns"][i][mask], returns, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found["train_mask"][i], mask)
        assert not found["advantages"][i][~mask].any()


def test_returns_without_values_are_credited_turn_by_turn():
    rows = make_rows()
    p = reinforce_pp.ReinforcePPParameters(discount=0.9, adv_norm=False, kl_ctl=0.2)
    found = run(reinforce_pp.make_advantages(p), rows)
    p = ppo.PPOParameters(discount=0.9, kl_ctl=0.2)
    for i, row in enumerate(rows):
        if i not in FAILED:
            expected, _ = compacted_gae(row, p, keeps_values=False, score=float(row["rewards"]))
            np.testing.assert_allclose(found["advantages"][i][row["loss_mask"]], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [grpo, rloo], ids=["grpo", "rloo"])
def test_baselines_are_those_of_whole_conversations_and_reach_sampled_tokens_alone(module):
    rows = make_rows()
    if module is grpo:
        parameters = grpo.GRPOParameters(discount=0.9, scale_by_std=False)
    else:
        parameters = rloo.RLOOParameters(discount=0.9, kl_ctl=0.0)
    found = run(module.make_advantages(parameters), rows)
    for i, row in enumerate(rows):
        mask = row["loss_mask"]
        if i in FAILED:
            assert not found["train_mask"][i].any()
            continue
        others = [
            float(one["rewards"])
            for k, one in enumerate(rows)
            if GROUPS[k] == GROUPS[i] and k not in FAILED and (module is grpo or k != i)
        ]
        advantage = float(row["rewards"]) - sum(others) / len(others)
        left = np.arange(mask.sum())[::-1]
        np.testing.assert_allclose(found["advantages"][i][mask], advantage * 0.9**left, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found["train_mask"][i], mask)
