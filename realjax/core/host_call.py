"""A step of an algorithm on the host, between model calls: rewards from texts, advantages from log-probabilities."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from realjax.core.metrics import Metric

Arrays = Mapping[str, np.ndarray]
State = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class HostResult:
    """What a host call returns: arrays `[R, T]` or `[R, S]` for the batch, its new state, and metrics to report.

    The state is a few plain numbers (running statistics, a controller's value); it is saved with the run.
    """

    arrays: dict[str, np.ndarray]
    state: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)


# fn(arrays, state) -> HostResult. The arrays hold the call's inputs, and always tokens, segment_ids and positions.
HostFn = Callable[[Arrays, State], HostResult]
