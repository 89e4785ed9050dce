"""How long programs take: the least of repeats that take turns, in all processes at once."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from realjax.core.processes import from_first, gather, largest

Key = TypeVar("Key", bound=Hashable)
# Starts a program, or a few, and returns arrays to wait for.
Probe = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times programs. A sample is as many runs as last `least_seconds`: of a short program one says little."""

    repeats: int = 7
    least_seconds: float = 0.02

    def measure(self, probes: Mapping[Key, Probe]) -> dict[Key, float]:
        """Returns the least seconds of one run of each probe.

        What else happens on a machine makes a run longer and never shorter, so the least is the program's own. Samples
        of the probes alternate, so that a machine that slows down slows all of them. Every process must call this with
        probes of the same names: they start each sample together, and the slowest of them counts.
        """
        counts = {}
        for key, probe in probes.items():
            jax.block_until_ready(probe())  # compiles
            seconds = _seconds(probe, 1)
            counts[key] = largest(max(1, round(self.least_seconds / max(seconds, 1e-6))))
        samples = np.empty((self.repeats, len(probes)))
        for i in range(self.repeats):
            for j, (key, probe) in enumerate(probes.items()):
                from_first(0)
                samples[i, j] = _seconds(probe, counts[key])
        # Of each sample: what makes one process wait now makes another wait then, and each time all wait.
        slowest = samples if jax.process_count() == 1 else gather(samples).max(axis=0)
        return dict(zip(probes, slowest.min(axis=0).tolist(), strict=True))


def _seconds(probe: Probe, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        # Each is waited for: a run in a step waits for what it reads as well.
        jax.block_until_ready(probe())
    return (time.perf_counter() - start) / count
