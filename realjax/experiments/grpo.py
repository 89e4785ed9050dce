"""GRPO: several answers to each prompt, judged against each other. No critic."""

from dataclasses import replace

from realjax.algorithms.grpo import make_advantages
from realjax.dataflow.run import DynamicSampling, RunSpec
from realjax.experiments.rl import build_without_critic
from realjax.options.rl import GRPOConfig


def build(config: GRPOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    most, stops = config.ppo.max_draws, config.ppo.if_uniform == "stop"
    sampling = DynamicSampling(max_draws=most, stops=stops) if most > 1 else None
    return replace(build_without_critic("grpo", config, make_advantages), sampling=sampling)
