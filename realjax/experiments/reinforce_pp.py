"""REINFORCE++: each answer's return, normalised over all answers of a step. No critic."""

from realjax.algorithms.reinforce_pp import make_advantages
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import build_without_critic
from realjax.options.rl import ReinforcePPConfig


def build(config: ReinforcePPConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    return build_without_critic("reinforce_pp", config, make_advantages)
