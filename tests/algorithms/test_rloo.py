import numpy as np
import pytest

from realjax.algorithms.rloo import RLOOParameters, make_advantages
from tests.algorithms.group_cases import NUM_SEQS, check_advantages, peers_of, plain_scores
from tests.algorithms.rollout_cases import PACKINGS, make_rollouts

VARIANTS = {
    "default": RLOOParameters(),
    "penalised": RLOOParameters(missing_eos_penalty=2.0, kl_estimator="k3", discount=0.9, max_reward_clip=1.0),
    "whitened": RLOOParameters(kl_ctl=0.0, adv_norm=True),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_baseline_is_the_mean_score_of_the_others(packing, variant):
    p, rollouts = VARIANTS[variant], make_rollouts()
    scores = plain_scores(rollouts, p, clips=True)
    expected = []
    for i in range(NUM_SEQS):
        others = [scores[j] for j in peers_of(i) if j != i]
        expected.append(scores[i] - np.mean(others) if others else 0.0)
    check_advantages(make_advantages(p), rollouts, p, expected, set(range(NUM_SEQS)), packing)
