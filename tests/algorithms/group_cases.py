"""What tests of GRPO, RLOO and ReMax share: a plain result of one advantage a sequence, compared by sequence."""

import numpy as np
import pytest

from realjax.algorithms.policy import PolicyParameters
from realjax.core.metrics import summarize
from tests.algorithms.rollout_cases import GROUPS, LENGTHS, Rollout, run_host_call

NUM_SEQS = len(LENGTHS)


def peers_of(i: int) -> list[int]:
    """Returns the sequences of the same prompt, itself among them."""
    return [j for j in range(NUM_SEQS) if GROUPS[j] == GROUPS[i]]


def plain_scores(rollouts: list[Rollout], p: PolicyParameters, *, clips: bool) -> list[float]:
    """Returns each sequence's score: clipped or not, less penalties and the summed KL."""
    scores = []
    for (prompt_len, _), r in zip(LENGTHS, rollouts, strict=True):
        score = float(r["rewards"])
        if clips:
            score = min(max(score, -p.max_reward_clip), p.max_reward_clip)
        score -= 0 if r["has_eos"] else p.missing_eos_penalty or 0
        d = r[p.old_logprobs][prompt_len:].astype(np.float64) - r["ref_logprobs"][prompt_len:]
        kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[p.kl_estimator]
        scores.append(score - (p.kl_ctl * kl.sum() if p.kl_in == "reward" else 0))
    return scores


def check_advantages(
    fn,
    rollouts: list[Rollout],
    p: PolicyParameters,
    expected: list[float],
    trained: set[int],
    packing: str,
    garbage: float = np.nan,
) -> dict[str, float]:
    """Fails where tokens' advantages are not the sequences' `expected`, discounted; returns the metrics."""
    found, result = run_host_call(fn, rollouts, packing=packing, garbage=garbage)
    assert set(found) == set(p.ADVANTAGE_OUTPUTS) and result.state == {}
    plain = []
    for i, (prompt_len, response_len) in enumerate(LENGTHS):
        tokens = [expected[i] * p.discount ** (response_len - 1 - t) for t in range(response_len)]
        plain.append(np.array([0.0] * prompt_len + tokens) * (i in trained))
        is_response = np.arange(prompt_len + response_len) >= prompt_len
        np.testing.assert_array_equal(found["train_mask"][i], is_response & (i in trained))
    flat = np.concatenate([tokens[LENGTHS[i][0] :] for i, tokens in enumerate(plain) if i in trained])
    for i, tokens in enumerate(plain):
        mask = found["train_mask"][i]
        if p.adv_norm:
            tokens = np.where(mask, (tokens - flat.mean()) / (flat.std() + 1e-5), 0)
        np.testing.assert_allclose(found["advantages"][i], tokens, rtol=1e-4, atol=1e-5)
    metrics = summarize([result.metrics])
    assert metrics["advantage"] == pytest.approx(flat.mean(), abs=1e-6)
    assert metrics["trained_seqs"] == len(trained)
    return metrics
