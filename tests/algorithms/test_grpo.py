import numpy as np
import pytest

from realjax.algorithms.grpo import GRPOParameters, make_advantages
from tests.algorithms.group_cases import NUM_SEQS, check_advantages, peers_of, plain_scores
from tests.algorithms.rollout_cases import CUT_OFF, GROUPS, LENGTHS, PACKINGS, make_rollouts

VARIANTS = {
    "ReaL": GRPOParameters(),
    "Dr. GRPO": GRPOParameters(scale_by_std=False, loss_aggregation="constant", max_response_len=12, kl_ctl=0),
    "DAPO": GRPOParameters(kl_ctl=0, overlong_penalty=1.0, overlong_buffer_len=6, max_response_len=12, discount=0.95),
    "in reward": GRPOParameters(kl_in="reward", kl_estimator="k1", adv_norm=True, missing_eos_penalty=1.0),
    "clipped": GRPOParameters(max_reward_clip=0.5, recompute_logprobs=True),
}


def overlong(length):
    """DAPO's soft punishment with 12 tokens at most, the last 6 of them punished."""
    return 0 if length <= 6 else (length - 6) / 6


def plain_advantages(rollouts, p):
    scores = plain_scores(rollouts, p, clips=False)
    if p.overlong_penalty:
        scores = [score - overlong(response) for score, (_, response) in zip(scores, LENGTHS, strict=True)]
    expected = []
    for i in range(NUM_SEQS):
        own = np.array([scores[j] for j in peers_of(i)])
        std = own.std(ddof=1) if len(own) > 1 else 0.0
        advantage = (scores[i] - own.mean()) / (std + 1e-5 if p.scale_by_std else 1)
        expected.append(min(max(advantage, -p.max_reward_clip), p.max_reward_clip))
    return expected


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_advantages_are_those_of_a_loop(packing, variant):
    p, rollouts = VARIANTS[variant], make_rollouts()
    everything = set(range(NUM_SEQS))
    expected = plain_advantages(rollouts, p)
    assert expected[6] == 0, "the only sample of a prompt"
    check_advantages(make_advantages(p), rollouts, p, expected, everything, packing)
    check_advantages(make_advantages(p), rollouts, p, expected, everything, packing, garbage=np.inf)


def test_truncated_responses_are_not_learned_but_count_in_their_group():
    p, rollouts = GRPOParameters(mask_truncated=True), make_rollouts()
    ended = {i for i, rollout in enumerate(rollouts) if rollout["has_eos"]}
    assert not ended & set(CUT_OFF)
    check_advantages(make_advantages(p), rollouts, p, plain_advantages(rollouts, p), ended, "short rows")


def test_prompts_whose_samples_score_alike_are_dropped():
    rollouts = [r | {"rewards": np.float32(0.1)} if GROUPS[i] == 0 else r for i, r in enumerate(make_rollouts())]
    p = GRPOParameters(drop_uniform_groups=True)
    kept = {i for i in range(NUM_SEQS) if GROUPS[i] in (1, 3)}
    metrics = check_advantages(make_advantages(p), rollouts, p, plain_advantages(rollouts, p), kept, "two rows")
    assert metrics["uniform_group_share"] == pytest.approx(1 - len(kept) / NUM_SEQS)


def test_lengths_must_be_known_where_they_count():
    with pytest.raises(
        ValueError, match="overlong_buffer_len: found 0; it must be at least 1 with an overlong_penalty"
    ):
        GRPOParameters(overlong_penalty=1.0)
    with pytest.raises(ValueError, match="max_response_len: found null"):
        make_advantages(GRPOParameters(overlong_penalty=1.0, overlong_buffer_len=4))
