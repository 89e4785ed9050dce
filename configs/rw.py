"""A reward model from a 7B Llama on 8 devices: the quickstart's stage 2.1.

    python -m launch.main --config=configs/rw.py \
        --config.model.path=/saved/sft/model/path \
        --config.dataset.train_path=/path/to/train/dataset.jsonl \
        --config.dataset.valid_path=/path/to/valid/dataset.jsonl

It is the same run as `realjax rw` with the quickstart's options. The rows hold "prompt", "pos_answers" and
"neg_answers"; a batch is 512 pairs. The language model's head gives way to a new scalar head. Expect a loss that starts
near ln 2 = 0.69 and falls, an accuracy `acc` that rises from 0.5, an evaluation before the first step and after the
epoch, and a Hugging Face checkpoint with a classifier of one label every 5 steps and at the end.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.supervised import RWConfig


def get_config() -> ConfigDict:
    """Returns the quickstart's values; the paths are the user's to give."""
    config: Any = to_config_dict(RWConfig, experiment="rw")
    config.experiment_name = "quickstart-rw"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "manual"

    config.exp_ctrl.total_train_epochs = 1
    config.exp_ctrl.save_freq_steps = 5
    config.exp_ctrl.eval_freq_epochs = 1

    config.model.type._class = "llama"
    config.model.type.size = 7
    config.model.type.is_critic = True
    config.model.gradient_checkpointing = True

    config.allocation.parallel.pipeline_parallel_size = 2
    config.allocation.parallel.model_parallel_size = 2
    config.allocation.parallel.data_parallel_size = 2
    config.allocation.parallel.use_sequence_parallel = True

    config.dataset.max_pairs_per_prompt = 2
    config.dataset.max_seqlen = 1024
    config.dataset.train_bs_n_seqs = 512
    config.dataset.valid_bs_n_seqs = 512
    return config
