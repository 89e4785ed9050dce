"""Supervised fine-tuning of a model of up to a billion parameters on the devices that are there.

    realjax sft --recipe sft-small model.path=MODEL dataset.train_path=rows.jsonl

Values to start from, for full fine-tuning on some thousands of rows: small models learn with ten times the rates of
large ones. A second pass over the rows helps where they are few, `total_train_epochs=2`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.supervised import SFTConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(SFTConfig, experiment="sft")
    config.experiment_name = "sft-small"

    config.model.optimizer.lr = 1e-4
    config.model.optimizer.warmup_steps_proportion = 0.05

    config.dataset.max_seqlen = 512
    config.dataset.train_bs_n_seqs = 32
    return config
