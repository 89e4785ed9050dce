"""REINFORCE++ (arXiv:2501.03262): returns of each token, normalised over the whole batch; no critic and no groups.

Its variant with a baseline subtracts the mean score of the prompt's answers first: use_baseline=True, with several
answers to a prompt, and kl_in=loss kl_estimator=k2 as there.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from realjax.algorithms.groups import Groups, finish_advantages
from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import clipped_scores, generalized_advantages, kl_penalty, place_scores
from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.metrics import measure_mean
from realjax.core.option import option


@dataclass(frozen=True, kw_only=True)
class ReinforcePPParameters(PolicyParameters):
    """REINFORCE++'s parameters. Raises ValueError for values outside their range."""

    use_baseline: bool = option(False, "subtract the mean score of the prompt's answers from each of theirs")


def make_advantages(parameters: ReinforcePPParameters) -> HostFn:
    """Returns the host call that makes `advantages` and `train_mask`, `[R, T]`, and `seq_share` `[R, S]`."""
    return partial(compute_advantages, parameters=parameters)


def compute_advantages(arrays: Arrays, state: State, *, parameters: ReinforcePPParameters) -> HostResult:
    """Returns each token's return: the response's score, less the KL of the tokens from this one on."""
    responses = Responses.of(arrays)
    groups = Groups.of(arrays["group"], responses.exists)
    penalty = kl_penalty(arrays, state, responses, parameters)
    scores = np.where(responses.exists, clipped_scores(arrays, parameters), 0)
    std = groups.std(scores)
    if parameters.use_baseline:
        scores -= groups.mean(scores)
    # Without values, and with lambda 1, generalised advantages are returns.
    returns, _ = generalized_advantages(
        responses,
        penalty.rewards + place_scores(arrays, responses, scores),
        np.zeros(responses.mask.shape),
        np.zeros_like(responses.exists),
        discount=parameters.discount,
        gae_lambda=1.0,
    )
    return finish_advantages(
        arrays,
        responses,
        returns,
        responses.exists,
        penalty=penalty,
        parameters=parameters,
        metrics={"group_std": measure_mean(std, responses.exists)},
    )
