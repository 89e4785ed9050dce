"""Responses judged against others, without a critic: what GRPO, RLOO, ReMax and REINFORCE++ have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import (
    Penalty,
    discounted_to_tokens,
    rollout_metrics,
    sequence_shares,
    whiten,
)
from realjax.core.host_call import Arrays, HostResult
from realjax.core.metrics import Metric, Total, measure_mean, measure_std


@dataclass(frozen=True, eq=False)
class Groups:
    """The prompts of the existing sequences; whatever goes in or out is `[R, S]`, 0 or False where none exists."""

    exists: np.ndarray
    numbers: np.ndarray  # [Q] the prompt of each of the Q sequences, 0..G-1
    sizes: np.ndarray  # [R, S] sequences of the prompt

    @classmethod
    def of(cls, group_RS: np.ndarray, exists: np.ndarray) -> "Groups":
        """Returns the groups of sequences that share an entry of `group_RS`."""
        _, numbers = np.unique(group_RS[exists], return_inverse=True)
        groups = cls(exists, numbers, np.zeros(exists.shape))
        return replace(groups, sizes=groups.sum(np.ones(exists.shape)))

    @property
    def num_groups(self) -> int:
        """G, the prompts."""
        return int(self.numbers.max(initial=-1)) + 1

    def sum(self, values_RS: np.ndarray) -> np.ndarray:
        """Returns the sum over each sequence's group."""
        return self._spread(np.bincount(self.numbers, values_RS[self.exists]))

    def mean(self, values_RS: np.ndarray) -> np.ndarray:
        """Returns the mean over each sequence's group."""
        return self.sum(values_RS) / np.maximum(self.sizes, 1)

    def std(self, values_RS: np.ndarray) -> np.ndarray:
        """Returns the unbiased standard deviation of each sequence's group; 0 for a group of one."""
        return np.sqrt(self.sum(np.square(values_RS - self.mean(values_RS))) / np.maximum(self.sizes - 1, 1))

    def is_uniform(self, values_RS: np.ndarray) -> np.ndarray:
        """Returns whether all values of each sequence's group are equal."""
        values = values_RS[self.exists]
        least, most = np.full(self.num_groups, np.inf), np.full(self.num_groups, -np.inf)
        np.minimum.at(least, self.numbers, values)
        np.maximum.at(most, self.numbers, values)
        return self._spread(least == most)

    def _spread(self, values_G: np.ndarray) -> np.ndarray:
        values_RS = np.zeros(self.exists.shape, values_G.dtype)
        values_RS[self.exists] = values_G[self.numbers]
        return values_RS


def spread_advantages(
    arrays: Arrays,
    responses: Responses,
    advantages_RS: np.ndarray,
    is_trained: np.ndarray,
    *,
    penalty: Penalty,
    parameters: PolicyParameters,
    metrics: Mapping[str, Metric],
) -> HostResult:
    """Returns the result of a host call that found one advantage for each sequence; see `finish_advantages`."""
    advantages = discounted_to_tokens(responses.only(is_trained), advantages_RS, parameters.discount)
    return finish_advantages(
        arrays, responses, advantages, is_trained, penalty=penalty, parameters=parameters, metrics=metrics
    )


def finish_advantages(
    arrays: Arrays,
    responses: Responses,
    advantages: np.ndarray,
    is_trained: np.ndarray,
    *,
    penalty: Penalty,
    parameters: PolicyParameters,
    metrics: Mapping[str, Metric],
) -> HostResult:
    """Returns the result of a host call that found advantages `[R, T]`, whitened where that is asked for.

    `is_trained` `[R, S]`: sequences to learn from. Metrics of lengths and scores are of all `responses`.
    """
    trained = responses.only(is_trained)
    reported = rollout_metrics(arrays, responses, parameters) | penalty.metrics | dict(metrics)
    reported |= {
        "advantage": measure_mean(advantages, trained.mask),
        "advantage_std": measure_std(advantages, trained.mask),
        "trained_seqs": Total(float(trained.num_seqs)),
    }
    if parameters.adv_norm:
        advantages = whiten(advantages, trained.mask)
    shares = sequence_shares(responses, trained)
    outputs = {"advantages": advantages, "seq_share": shares}
    arrays_out = {name: array.astype(np.float32) for name, array in outputs.items()}
    return HostResult(arrays=arrays_out | {"train_mask": trained.mask}, state=penalty.state, metrics=reported)
