"""What a sampled token counts when the sampler is not the policy that training starts from.

Three policies are told apart: mu drew the tokens (`logprobs`), prox is the actor as a step's training begins
(`old_logprobs`), and the actor moves on from there. A token's loss is weighted by prox / mu, within bounds or without;
the ratio that the loss clips is current / prox. Both together are decoupled PPO (arXiv:2110.00641, 2505.24298).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from realjax.algorithms.kl import MAX_EXPONENT, estimate_kl
from realjax.algorithms.responses import Responses
from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.metrics import EffectiveShare, Metric, measure_mean
from realjax.core.option import check_conditions, check_ranges, option

CORRECTION_INPUTS = ("train_mask", "has_eos", "logprobs", "old_logprobs")


@dataclass(frozen=True, kw_only=True)
class CorrectionParameters:
    """The weight prox / mu of a token, and its bounds. Raises ValueError for values outside their range.

    `tis` truncates it as arXiv:1802.01561 does. `mis` with low=0.5 and high=5 is IcePop (arXiv:2510.18855).
    """

    kind: Literal["auto", "none", "tis", "mis"] = option(
        "auto",
        "tis: weights count up to high. mis: what has a weight outside [low, high] is left out. auto: tis where "
        "staleness is above 0, else none",
    )
    level: Literal["token", "sequence", "geometric"] = option(
        "token", "a token's own weight; or that of its response: the product over tokens, or their geometric mean"
    )
    low: float = option(0.0, "lower bound of the weight, of mis", at_least=0)
    high: float | None = option(2.0, "upper bound of the weight. null: none", above=0)
    reject_above: float | None = option(
        None,
        "responses whose mean of log(prox / mu) is further than this from 0, in nats a token, are left out. null: none",
        above=0,
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        is_band = self.kind != "mis" or self.high is None or self.low < self.high
        check_conditions(self, low=(is_band, f"below high, which is {self.high}"))

    @property
    def is_on(self) -> bool:
        """Whether any token can have another weight than 1."""
        return self.kind in ("tis", "mis") or self.reject_above is not None


def make_corrections(parameters: CorrectionParameters) -> HostFn:
    """Returns the host call that writes `correction` `[R, T]`: each token's weight, 0 for a token that is left out."""
    return partial(compute_corrections, parameters=parameters)


def compute_corrections(arrays: Arrays, state: State, *, parameters: CorrectionParameters) -> HostResult:
    """Returns the weights of the tokens in `train_mask`, and how far mu is from prox.

    Reads `train_mask`, `logprobs`, `old_logprobs` `[R, T]`, and `has_eos` `[R, S]` for S. Metrics are of these tokens:
    `correction_ess` is the share of them that as many equal weights would be worth, `sampler_kl` is KL(mu || prox).
    """
    responses = Responses.of({**arrays, "loss_mask": arrays["train_mask"]})
    mu, prox = responses.select(arrays["logprobs"]), responses.select(arrays["old_logprobs"])
    sums = responses.sum(prox - mu)
    means = sums / np.maximum(responses.lens, 1)
    exponents = {"token": prox - mu, "sequence": responses.spread(sums), "geometric": responses.spread(means)}
    weights = np.exp(np.clip(exponents[parameters.level], -MAX_EXPONENT, MAX_EXPONENT))
    high = np.inf if parameters.high is None else parameters.high
    is_cut, is_left_out = np.zeros_like(responses.mask), np.zeros_like(responses.mask)
    if parameters.kind == "tis":
        is_cut, weights = weights > high, np.minimum(weights, high)
    elif parameters.kind == "mis":
        is_left_out = (weights < parameters.low) | (weights > high)
    else:
        weights = np.ones_like(weights)
    if parameters.reject_above is not None:
        is_left_out |= responses.spread(np.abs(means)) > parameters.reject_above
    weights = responses.select(np.where(is_left_out, 0, weights))
    chosen = weights[responses.mask]
    metrics: dict[str, Metric] = {
        "correction_weight": measure_mean(weights, responses.mask),
        "correction_ess": EffectiveShare(float(chosen.sum()), float(np.square(chosen).sum()), float(chosen.size)),
        "correction_cut": measure_mean(is_cut, responses.mask),
        "correction_left_out": measure_mean(is_left_out, responses.mask),
        "sampler_kl": measure_mean(estimate_kl(mu, prox, "k3"), responses.mask),
    }
    return HostResult(arrays={"correction": weights.astype(np.float32)}, metrics=metrics)
