"""RLOO: several answers to each prompt, each judged against the mean of the others. No critic."""

from collections.abc import Sequence

import jax

from realjax.algorithms.rloo import make_advantages
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import build_without_critic
from realjax.options.rl import RLOOConfig


def build(config: RLOOConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, models or layouts that cannot work, before anything is allocated."""
    return build_without_critic("rloo", config, devices, make_advantages)
