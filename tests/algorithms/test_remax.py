import numpy as np
import pytest

from realjax.algorithms.remax import ReMaxParameters, make_advantages
from tests.algorithms.group_cases import NUM_SEQS, check_advantages, peers_of, plain_scores
from tests.algorithms.rollout_cases import PACKINGS, make_rollouts, run_host_call

VARIANTS = {
    "ReaL": ReMaxParameters(),
    "with a reference": ReMaxParameters(kl_ctl=0.2, adv_norm=True, discount=1.0, max_reward_clip=1.0),
}


def baseline_of(rollouts, i):
    return next(j for j in peers_of(i) if rollouts[j]["is_baseline"])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_baseline_is_the_greedy_score_and_is_not_trained_on(packing, variant):
    p, rollouts = VARIANTS[variant], make_rollouts()
    scores = plain_scores(rollouts, p, clips=True)
    greedy = [float(np.clip(r["rewards"], -p.max_reward_clip, p.max_reward_clip)) for r in rollouts]
    expected = [scores[i] - greedy[baseline_of(rollouts, i)] for i in range(NUM_SEQS)]
    sampled = {i for i in range(NUM_SEQS) if not rollouts[i]["is_baseline"]}
    metrics = check_advantages(make_advantages(p), rollouts, p, expected, sampled, packing)
    rewards = np.array([r["rewards"] for r in rollouts])
    assert metrics["task_reward"] == pytest.approx(rewards[sorted(sampled)].mean(), rel=1e-6)
    baselines = [i for i in range(NUM_SEQS) if i not in sampled]
    assert metrics["baseline_reward"] == pytest.approx(rewards[baselines].mean(), rel=1e-6)
    assert metrics["n_seqs"] == len(sampled)


def test_a_prompt_without_a_greedy_response_is_an_error():
    rollouts = [r | {"is_baseline": np.array(False)} if i == 0 else r for i, r in enumerate(make_rollouts())]
    with pytest.raises(ValueError, match="3 of 7 responses belong to a prompt without a greedy response"):
        run_host_call(make_advantages(ReMaxParameters()), rollouts)


def test_inputs_name_the_baseline():
    assert ReMaxParameters().advantage_inputs[-2:] == ("group", "is_baseline")
    assert "ref_logprobs" not in ReMaxParameters().advantage_inputs
