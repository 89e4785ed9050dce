"""Metrics on their way to a number: those of a set's parts merge into those of the set, and become numbers once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A weighted sum on its way to a mean."""

    sum: Any
    weight: Any

    @property
    def value(self) -> Any:
        """nan, or an error outside of arrays, where the weight is 0."""
        return self.sum / self.weight

    def merged(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.weight + other.weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Total:
    """A plain sum, such as a number of tokens."""

    sum: Any

    @property
    def value(self) -> Any:
        return self.sum

    def merged(self, other: "Total") -> "Total":
        return Total(self.sum + other.sum)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Std:
    """A biased standard deviation of `weight` values: their mean, and the sum of their squared distances from it."""

    mean: float
    squares: float
    weight: float

    @property
    def value(self) -> float:
        return (self.squares / self.weight) ** 0.5

    def merged(self, other: "Std") -> "Std":
        """Returns that of both parts together."""
        # Chan, Golub and LeVeque 1983: sums of plain squares would lose the digits of a spread around a large mean.
        if not (weight := self.weight + other.weight):
            return self
        gap, share = other.mean - self.mean, other.weight / weight
        squares = self.squares + other.squares + gap * gap * self.weight * share
        return Std(self.mean + gap * share, squares, weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EffectiveShare:
    """(sum of weights)^2 / (number of them * sum of their squares): 1 where all are equal, 0 where all are 0."""

    sum: Any
    squares: Any
    weight: Any  # how many weights

    @property
    def value(self) -> Any:
        # The last term: 0 and not nan, where all weights are 0.
        return self.sum * self.sum / (self.weight * self.squares + (self.squares == 0))

    def merged(self, other: "EffectiveShare") -> "EffectiveShare":
        return EffectiveShare(self.sum + other.sum, self.squares + other.squares, self.weight + other.weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Least:
    """The smallest of a set's values."""

    value: float

    def merged(self, other: "Least") -> "Least":
        return Least(min(self.value, other.value))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Most:
    """The largest of a set's values."""

    value: float

    def merged(self, other: "Most") -> "Most":
        return Most(max(self.value, other.value))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Last:
    """A state, such as a running count: the last part's is the whole's."""

    value: Any

    def merged(self, other: "Last") -> "Last":
        return other


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Load:
    """How uneven counts `[L, E]` are: a row's largest over its mean, as a mean over the rows that count anything."""

    counts: Any

    @property
    def value(self) -> Any:
        """At least 1; 0 where nothing is counted."""
        sums, largest = self.counts.sum(axis=-1), self.counts.max(axis=-1)
        share = self.counts.shape[-1] * largest / (sums + (sums == 0))
        num_rows = (sums > 0).sum()
        return share.sum() / (num_rows + (num_rows == 0))

    def merged(self, other: "Load") -> "Load":
        return Load(self.counts + other.counts)


Metric = Mean | Total | Std | EffectiveShare | Least | Most | Last | Load


def measure_mean(values: np.ndarray, mask: np.ndarray) -> Mean:
    """Returns the mean of the masked entries."""
    return Mean(float(values[mask].sum()), float(np.count_nonzero(mask)))


def measure_std(values: np.ndarray, mask: np.ndarray) -> Std:
    """Returns the biased standard deviation of the masked entries."""
    chosen = values[mask].astype(np.float64)
    mean = float(chosen.mean()) if chosen.size else 0.0
    return Std(mean, float(np.square(chosen - mean).sum()), float(chosen.size))


def finalize(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Returns the number that each metric stands for."""
    return {name: metric.value for name, metric in metrics.items()}


def summarize(parts: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """Returns the metrics of the set that consists of these parts, added up in float64; those of nothing are left out.

    It does not depend on how the set was cut into parts, nor do totals, which are the set's.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            metric = jax.tree.map(_widen, metric)
            merged[name] = merged[name].merged(metric) if name in merged else metric
    return {name: float(metric.value) for name, metric in merged.items() if getattr(metric, "weight", 1.0) != 0}


def _widen(value: Any) -> float | np.ndarray:
    return np.asarray(value, np.float64) if np.ndim(value) else float(value)
