import numpy as np
import pytest

from realjax.algorithms.reinforce_pp import ReinforcePPParameters, make_advantages
from realjax.core.metrics import summarize
from tests.algorithms.group_cases import NUM_SEQS, peers_of
from tests.algorithms.rollout_cases import LENGTHS, PACKINGS, make_rollouts, run_host_call

VARIANTS = {
    "default": ReinforcePPParameters(),
    "baseline": ReinforcePPParameters(use_baseline=True, kl_in="loss", kl_estimator="k2"),
    "penalised": ReinforcePPParameters(
        missing_eos_penalty=2.0, kl_estimator="k3", discount=0.9, max_reward_clip=1.0, adv_norm=False
    ),
}


def plain_returns(rollouts, p):
    """Each token's return in a loop from the back, normalised over the tokens of all responses."""
    scores = [min(max(float(r["rewards"]), -p.max_reward_clip), p.max_reward_clip) for r in rollouts]
    scores = [s - (0 if r["has_eos"] else p.missing_eos_penalty or 0) for s, r in zip(scores, rollouts, strict=True)]
    if p.use_baseline:
        scores = [scores[i] - np.mean([scores[j] for j in peers_of(i)]) for i in range(NUM_SEQS)]
    returns = []
    for (prompt_len, response_len), r, score in zip(LENGTHS, rollouts, scores, strict=True):
        d = r["logprobs"].astype(np.float64) - r["ref_logprobs"]
        kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[p.kl_estimator] * (p.kl_in == "reward")
        own, after = np.zeros(prompt_len + response_len), 0.0
        for t in reversed(range(prompt_len, prompt_len + response_len)):
            reward = score if t == prompt_len + response_len - 1 else 0.0
            own[t] = after = reward - p.kl_ctl * kl[t] + p.discount * after
        returns.append(own)
    flat = np.concatenate([own[r["loss_mask"]] for own, r in zip(returns, rollouts, strict=True)])
    if not p.adv_norm:
        return returns, flat.mean()
    return [
        np.where(r["loss_mask"], (own - flat.mean()) / (flat.std() + 1e-5), 0)
        for own, r in zip(returns, rollouts, strict=True)
    ], flat.mean()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_advantages_are_returns_normalised_over_the_batch(packing, variant):
    p, rollouts = VARIANTS[variant], make_rollouts()
    found, result = run_host_call(make_advantages(p), rollouts, packing=packing)
    expected, mean = plain_returns(rollouts, p)
    assert set(found) == set(p.ADVANTAGE_OUTPUTS) and result.state == {}
    for own, others in zip(found["advantages"], expected, strict=True):
        np.testing.assert_allclose(own, others, rtol=1e-4, atol=1e-5)
    for own, r in zip(found["train_mask"], rollouts, strict=True):
        np.testing.assert_array_equal(own, r["loss_mask"])
    metrics = summarize([result.metrics])
    assert metrics["advantage"] == pytest.approx(mean, abs=1e-6)
    assert metrics["trained_seqs"] == NUM_SEQS
