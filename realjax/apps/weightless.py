"""Models whose directories hold no weights: what is planned or compiled needs their shapes alone."""

import dataclasses
import logging
from pathlib import Path

from realjax.options.common import CommonExperimentConfig
from realjax.options.model import ModelTrainEvalConfig

logger = logging.getLogger("realjax.apps")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")


def without_weights(config: CommonExperimentConfig) -> CommonExperimentConfig:
    """Returns the options with models from scratch where their directories hold no weights: shapes are the same."""
    changes: dict[str, ModelTrainEvalConfig] = {}
    for name, model in vars(config).items():
        if isinstance(model, ModelTrainEvalConfig) and name not in config.unused and _lacks_weights(model):
            logger.info("%s.path has no weights: its shapes follow from config.json", name)
            critic = dataclasses.replace(model.type, is_critic=model.is_critic)
            changes[name] = dataclasses.replace(
                model, type=critic, init_from_scratch=True, init_critic_from_actor=False
            )
    return dataclasses.replace(config, **changes)


def _lacks_weights(model: ModelTrainEvalConfig) -> bool:
    path = Path(model.path).expanduser()
    return path.is_dir() and not any(True for pattern in WEIGHTS for _ in path.glob(pattern))
