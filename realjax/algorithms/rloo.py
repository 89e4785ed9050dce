"""RLOO (arXiv:2402.14740): a response's baseline is the mean score of the prompt's other samples."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from realjax.algorithms.groups import Groups, spread_advantages
from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import clipped_scores, kl_penalty
from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.metrics import measure_mean
from realjax.core.option import option


@dataclass(frozen=True, kw_only=True)
class RLOOParameters(PolicyParameters):
    """RLOO's parameters. Raises ValueError for values outside their range."""

    adv_norm: bool = option(False, "whiten advantages over the whole batch")


def make_advantages(parameters: RLOOParameters) -> HostFn:
    """Returns the host call that makes `advantages` and `train_mask`, `[R, T]`, and `seq_share` `[R, S]`."""
    return partial(compute_advantages, parameters=parameters)


def compute_advantages(arrays: Arrays, state: State, *, parameters: RLOOParameters) -> HostResult:
    """Returns score - mean score of the prompt's other samples for every response; a prompt's only one has 0.

    The KL in the reward is summed over the response and part of its score.
    """
    responses = Responses.of(arrays)
    groups = Groups.of(arrays["group"], responses.exists)
    penalty = kl_penalty(arrays, state, responses, parameters)
    scores = np.where(responses.exists, clipped_scores(arrays, parameters), 0) + responses.sum(penalty.rewards)
    # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1); alone in its group r - mean is 0.
    advantages = (scores - groups.mean(scores)) * groups.sizes / np.maximum(groups.sizes - 1, 1)
    metrics = {"group_std": measure_mean(groups.std(scores), responses.exists)}
    return spread_advantages(
        arrays, responses, advantages, responses.exists, penalty=penalty, parameters=parameters, metrics=metrics
    )
