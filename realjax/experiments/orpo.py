"""ORPO: fine-tuning on better answers, and odds against the worse. One model, one training call."""

from realjax.algorithms.orpo import make_orpo_loss
from realjax.dataflow.run import RunSpec
from realjax.experiments.pairs import build_on_pairs
from realjax.options.supervised import ORPOConfig


def build(config: ORPOConfig) -> RunSpec:
    """Returns the run. Raises ValueError for data or a model that cannot work."""
    return build_on_pairs("orpo", config, lambda draw: make_orpo_loss(config.parameters, draw))
