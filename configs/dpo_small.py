"""Direct preference optimisation of a model of up to a billion parameters on the devices that are there.

    realjax dpo --recipe dpo-small actor.path=MODEL ref.path=MODEL dataset.train_path=pairs.jsonl

Values to start from. MODEL is a fine-tuned one, twice the same. Where `acc` stays at a half raise `actor.optimizer.lr`;
where answers become strange lower it, or raise `beta`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.supervised import DPOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(DPOConfig, experiment="dpo")
    config.experiment_name = "dpo-small"

    config.beta = 0.1
    config.actor.optimizer.lr = 5e-6
    config.actor.optimizer.warmup_steps_proportion = 0.1

    config.dataset.max_seqlen = 512
    config.dataset.train_bs_n_seqs = 32
    return config
