"""ReMax (arXiv:2310.10505): a response's baseline is the score of the prompt's greedy response."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from realjax.algorithms.groups import Groups, spread_advantages
from realjax.algorithms.policy import PolicyParameters, Surrogate
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import clipped_scores, kl_penalty
from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.metrics import measure_mean
from realjax.core.option import option
from realjax.core.segments import segment_mask


@dataclass(frozen=True, kw_only=True)
class ReMaxParameters(PolicyParameters):
    """ReMax's parameters: the plain policy gradient without a reference. Raises ValueError for values out of range."""

    kl_ctl: float = option(0.0, "coefficient of the KL to the reference; 0: no reference model is needed", at_least=0)
    discount: float = option(0.99, "discount of rewards, per token", above=0, at_most=1)
    adv_norm: bool = option(False, "whiten advantages over the whole batch")
    surrogate: Surrogate = option(
        "reinforce", "reinforce: the plain policy gradient, without a ratio. The others: as in PPO"
    )

    JUDGED_BY: ClassVar[tuple[str, ...]] = ("group", "is_baseline")


def make_advantages(parameters: ReMaxParameters) -> HostFn:
    """Returns the host call that makes `advantages` and `train_mask`, `[R, T]`, and `seq_share` `[R, S]`; greedy
    responses are not trained on.
    """
    return partial(compute_advantages, parameters=parameters)


def compute_advantages(arrays: Arrays, state: State, *, parameters: ReMaxParameters) -> HostResult:
    """Returns score - score of the prompt's greedy response for every sampled one.

    The KL in the reward is summed over the response and part of its score, but not of the baseline. Responses to a
    prompt whose greedy one failed are left out: nothing tells what they are worth. Raises ValueError for a prompt
    without a greedy response.
    """
    everything = Responses.of(arrays)
    _refuse_lonely(arrays)
    is_baseline = arrays["is_baseline"].astype(bool) & everything.exists
    groups = Groups.of(arrays["group"], everything.exists)
    num_baselines = groups.sum(is_baseline)
    sampled = everything.only(~is_baseline & (num_baselines > 0))
    penalty = kl_penalty(arrays, state, sampled, parameters)
    scores = np.where(everything.exists, clipped_scores(arrays, parameters), 0)
    baseline = groups.sum(np.where(is_baseline, scores, 0)) / np.maximum(num_baselines, 1)
    advantages = scores + sampled.sum(penalty.rewards) - baseline
    metrics = {"baseline_reward": measure_mean(arrays["rewards"].astype(np.float64), is_baseline)}
    return spread_advantages(
        arrays, sampled, advantages, sampled.exists, penalty=penalty, parameters=parameters, metrics=metrics
    )


def _refuse_lonely(arrays: Arrays) -> None:
    exists = segment_mask(arrays["segment_ids"], arrays["group"].shape[1])
    is_baseline = arrays["is_baseline"].astype(bool) & exists
    is_sampled, num_baselines = exists & ~is_baseline, Groups.of(arrays["group"], exists).sum(is_baseline)
    if lonely := np.count_nonzero(is_sampled & (num_baselines == 0)):
        raise ValueError(
            f"ReMax: {lonely} of {np.count_nonzero(is_sampled)} responses belong to a prompt without a greedy "
            "response; needed one for every prompt: generate with a greedy baseline"
        )
