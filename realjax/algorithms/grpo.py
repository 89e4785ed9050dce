"""GRPO (arXiv:2402.03300), Dr. GRPO (2503.20783) and DAPO (2503.14476): scores normalised within a prompt's samples.

GRPO: the defaults, and loss_aggregation=sequence for the paper's mean over sequences. Dr. GRPO: scale_by_std=False
loss_aggregation=constant kl_ctl=0. DAPO: eps_clip_high=0.28 kl_ctl=0 drop_uniform_groups=True overlong_penalty=1 and an
overlong_buffer_len; groups without a signal are left out, and not sampled anew.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from realjax.algorithms.groups import Groups, spread_advantages
from realjax.algorithms.kl import Estimator
from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import kl_penalty
from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.metrics import measure_mean
from realjax.core.option import check_conditions, option


@dataclass(frozen=True, kw_only=True)
class GRPOParameters(PolicyParameters):
    """GRPO's parameters. Raises ValueError for values outside their range."""

    kl_in: Literal["reward", "loss"] = option(
        "loss", "loss: the KL to the reference is a term of it. reward: of rewards"
    )
    kl_estimator: Estimator = option("k3", "d, d^2/2 or exp(-d)-1+d per token, d = logprob - reference logprob")
    adv_norm: bool = option(False, "whiten advantages over the whole batch, on top of the groups' normalisation")
    max_reward_clip: float = option(20.0, "normalised scores are clipped to +-max_reward_clip", above=0)
    scale_by_std: bool = option(True, "divide by the group's standard deviation; False: only subtract its mean")
    mask_truncated: bool = option(False, "learn nothing from responses cut off at max_new_tokens")
    drop_uniform_groups: bool = option(False, "learn nothing from prompts whose samples all have the same score")
    overlong_penalty: float = option(0.0, "penalty of the longest responses, subtracted from scores", at_least=0)
    overlong_buffer_len: int = option(
        0, "the penalty grows linearly over this many last tokens of max_response_len", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        has_buffer = self.overlong_penalty == 0 or self.overlong_buffer_len >= 1
        check_conditions(self, overlong_buffer_len=(has_buffer, "at least 1 with an overlong_penalty"))


def make_advantages(parameters: GRPOParameters) -> HostFn:
    """Returns the host call that makes `advantages` and `train_mask`, `[R, T]`, and `seq_share` `[R, S]`.

    Raises ValueError where a length is needed but not known.
    """
    if parameters.overlong_penalty > 0 and parameters.max_response_len is None:
        raise ValueError("max_response_len: found null; overlong_penalty starts overlong_buffer_len before it: set it")
    return partial(compute_advantages, parameters=parameters)


def compute_advantages(arrays: Arrays, state: State, *, parameters: GRPOParameters) -> HostResult:
    """Returns (score - group mean) / (group std + 1e-5) for every response; the only one of a group has 0.

    The standard deviation is unbiased. Truncated and unlearned responses still count in their group.
    """
    responses = Responses.of(arrays)
    groups = Groups.of(arrays["group"], responses.exists)
    penalty = kl_penalty(arrays, state, responses, parameters)
    rewards = np.where(responses.exists, arrays["rewards"], 0).astype(np.float64)
    truncation = np.where(arrays["has_eos"], 0, parameters.missing_eos_penalty or 0.0)
    overlong = _overlong_share(responses.lens, parameters) * parameters.overlong_penalty
    scores = rewards - truncation - overlong + responses.sum(penalty.rewards)
    advantages = scores - groups.mean(scores)
    std = groups.std(scores)
    if parameters.scale_by_std:
        advantages /= std + 1e-5
    advantages = np.clip(advantages, -parameters.max_reward_clip, parameters.max_reward_clip)
    is_uniform = groups.is_uniform(rewards)
    is_trained = responses.exists.copy()
    if parameters.mask_truncated:
        is_trained &= arrays["has_eos"].astype(bool)
    if parameters.drop_uniform_groups:
        is_trained &= ~is_uniform
    return spread_advantages(
        arrays,
        responses,
        advantages,
        is_trained,
        penalty=penalty,
        parameters=parameters,
        metrics={
            "group_std": measure_mean(std, responses.exists),
            "uniform_group_share": measure_mean(is_uniform, responses.exists),
            "overlong_penalty": measure_mean(overlong, responses.exists),
        },
    )


def _overlong_share(lens: np.ndarray, parameters: GRPOParameters) -> np.ndarray:
    """Returns 0 up to the buffer, 1 at its end, `[R, S]` (arXiv:2503.14476 eq. 13)."""
    if parameters.overlong_penalty == 0 or parameters.max_response_len is None:
        return np.zeros(lens.shape)
    start = parameters.max_response_len - parameters.overlong_buffer_len
    return np.clip((lens - start) / parameters.overlong_buffer_len, 0, 1)
