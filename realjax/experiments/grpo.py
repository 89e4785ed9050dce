"""GRPO: several answers to each prompt, judged against each other. No critic."""

from realjax.algorithms.grpo import make_advantages
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import build_without_critic
from realjax.options.rl import GRPOConfig


def build(config: GRPOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    return build_without_critic("grpo", config, make_advantages)
