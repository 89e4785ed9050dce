"""KL to the reference: estimates per token, and the controller of its coefficient."""

import logging
from collections.abc import Mapping
from typing import Literal, TypeVar

import jax
import numpy as np

Logs = TypeVar("Logs", np.ndarray, jax.Array)
Estimator = Literal["k1", "k2", "k3"]
# exp(20) = 4.9e8: far beyond any ratio that is of use, far below float32's largest number.
MAX_EXPONENT = 20.0
logger = logging.getLogger("realjax.kl")
# The controller's state. Saves of before have `kl_coef`, steered by another measure.
KL_COEFFICIENT, OLDER_COEFFICIENT = "kl_coefficient", "kl_coef"


def estimate_kl(logprobs: Logs, ref_logprobs: Logs, estimator: Estimator) -> Logs:
    """Returns estimates of KL(policy || reference) from tokens drawn from the policy; NumPy or JAX arrays, any shape.

    With d = logprobs - ref_logprobs (J. Schulman, "Approximating KL divergence", 2020): k1 = d is unbiased; k2 = d^2/2
    is biased; k3 = exp(-d) - 1 + d is unbiased and never negative. As terms of a loss on fresh samples, k2 has the KL's
    expected gradient, k3 that of KL(reference || policy), and k1 none: it belongs into the reward.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    namespace = d.__array_namespace__()
    return namespace.exp(namespace.clip(-d, -MAX_EXPONENT, MAX_EXPONENT)) - 1 + d


def kl_coefficient(state: Mapping[str, float], kl_ctl: float) -> float:
    """Returns the coefficient in force: the controller's own, `kl_ctl` before its first update.

    The coefficient of an older save is not taken over: it was steered by the mean KL per token, and so only fell.
    """
    if OLDER_COEFFICIENT in state:
        logger.warning(
            "kl_ctl: the save's adaptive coefficient %.3g was steered by the KL per token, not per response; it starts "
            "again from kl_ctl=%g", state[OLDER_COEFFICIENT], kl_ctl,
        )  # fmt: skip
    return float(state.get(KL_COEFFICIENT, kl_ctl))


def adapt_coefficient(coefficient: float, kl: float, num_seqs: int, *, target: float, horizon: float) -> float:
    """Returns the coefficient after a step whose mean KL per response was `kl` nats (arXiv:1909.08593, section 2.2).

    It moves by at most a share of 0.2 num_seqs / horizon, and by no more than 0.2: up where `kl` is above `target` and
    down where it is below.
    """
    error = float(np.clip(kl / target - 1, -0.2, 0.2))
    return coefficient * (1 + error * min(num_seqs / horizon, 1))
