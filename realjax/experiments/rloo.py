"""RLOO: several answers to each prompt, each judged against the mean of the others. No critic."""

from realjax.algorithms.rloo import make_advantages
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import build_without_critic
from realjax.options.rl import RLOOConfig


def build(config: RLOOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    return build_without_critic("rloo", config, make_advantages)
