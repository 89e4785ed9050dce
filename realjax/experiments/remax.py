"""ReMax: an answer to each prompt, judged against the greedy one. No critic."""

from realjax.algorithms.remax import make_advantages
from realjax.dataflow.run import RunSpec
from realjax.experiments.rl import build_without_critic
from realjax.options.rl import ReMaxConfig


def build(config: ReMaxConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or models that cannot work."""
    return build_without_critic("remax", config, make_advantages, has_baseline=True)
