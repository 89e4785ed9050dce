"""SimPO of a 7B Llama on 8 devices: preferences without a reference model.

    python -m launch.main --config=configs/simpo.py \
        --config.actor.path=/saved/sft/model/path \
        --config.dataset.train_path=/path/to/train/dataset.jsonl

The rows are those of reward modelling, and so are the pairs. One model is trained, at about the memory of supervised
fine-tuning. Expect a falling loss and a growing `margin`; above `gamma` a pair is as far apart as is asked for. Its
authors take learning rates below 1e-6: answers grow long and odd above.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.supervised import SimPOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(SimPOConfig, experiment="simpo")
    config.experiment_name = "simpo"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "manual"

    config.exp_ctrl.total_train_epochs = 1

    config.actor.type._class = "llama"
    config.actor.type.size = 7
    config.actor.optimizer.lr = 6e-7

    config.actor_train.parallel.model_parallel_size = 4
    config.actor_train.parallel.data_parallel_size = 2
    config.actor_train.parallel.use_sequence_parallel = True

    config.dataset.max_pairs_per_prompt = 2
    config.dataset.max_seqlen = 1024
    config.dataset.train_bs_n_seqs = 128
    config.dataset.valid_bs_n_seqs = 128
    return config
