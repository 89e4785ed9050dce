"""SimPO: pairs of answers compared by their mean log-probabilities. One model, one training call."""

from realjax.algorithms.simpo import make_simpo_loss
from realjax.dataflow.run import RunSpec
from realjax.experiments.pairs import build_on_pairs
from realjax.options.supervised import SimPOConfig


def build(config: SimPOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or a model that cannot work."""
    return build_on_pairs("simpo", config, lambda draw: make_simpo_loss(config.parameters, draw))
