"""Running statistics of returns, by which a critic's targets are normalised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

MAX_NORMALISED = 5.0
LEAST_VARIANCE = 1e-2


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of the returns seen so far."""

    mean: float = 0.0
    std: float = 1.0

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Returns the values in units of `std` around `mean`, at most 5 of them away."""
        return np.clip((values - self.mean) / self.std, -MAX_NORMALISED, MAX_NORMALISED)

    def denormalise(self, values: np.ndarray) -> np.ndarray:
        return values * self.std + self.mean


def read_statistics(state: Mapping[str, float], kind: Literal["exp", "ma"], eps: float) -> Statistics:
    """Returns the statistics that a state holds; without any: mean 0, and 0.1, the least standard deviation.

    `eps` bounds the weight that an exponential mean is divided by from below.
    """
    scale = 1.0 if kind == "ma" else max(state.get("value_weight", 0.0), eps)
    mean = state.get("value_mean", 0.0) / scale
    variance = state.get("value_mean_square", 0.0) / scale - mean * mean
    return Statistics(mean=mean, std=float(np.sqrt(max(variance, LEAST_VARIANCE))))


def update_statistics(
    state: Mapping[str, float], returns: np.ndarray, *, kind: Literal["exp", "ma"], beta: float
) -> dict[str, float]:
    """Returns the state with `returns` (one dim) taken in; none of them: unchanged.

    `exp`: exponential means of each batch's mean and mean square, not yet divided by their weight 1 - beta^n, which
    stands beside them (Adam's correction of the start). `ma`: means over all returns ever; the weight is their number.
    """
    names = ("value_mean", "value_mean_square", "value_weight")
    if not returns.size:
        return {name: state[name] for name in names if name in state}
    old = np.array([state.get(name, 0.0) for name in names])
    x = returns.astype(np.float64)
    batch = np.array([x.mean(), np.square(x).mean(), 1.0])
    if kind == "exp":
        new = beta * old + (1 - beta) * batch
    else:
        weight = old[2] + x.size
        new = old + (batch - old) * (x.size / weight)
        new[2] = weight
    return dict(zip(names, new.tolist()))
