"""GRPO: several answers to each prompt, judged against each other. No critic."""

from collections.abc import Sequence

import jax

from realjax.algorithms.grpo import make_advantages
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import build_without_critic
from realjax.options.rl import GRPOConfig


def build(config: GRPOConfig, devices: Sequence[jax.Device]) -> RunSpec:
    """Returns the run. Raises ValueError for data, models or layouts that cannot work, before anything is allocated."""
    return build_without_critic("grpo", config, devices, make_advantages)
