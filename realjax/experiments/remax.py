"""ReMax: an answer to each prompt, judged against the greedy one. No critic."""

from collections.abc import Sequence

import jax

from realjax.algorithms.remax import make_advantages
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import build_without_critic
from realjax.options.rl import ReMaxConfig


def build(config: ReMaxConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, models or layouts that cannot work, before anything is allocated."""
    return build_without_critic("remax", config, devices, make_advantages, has_baseline=True)
