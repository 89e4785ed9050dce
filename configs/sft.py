"""Supervised fine-tuning of a 7B Llama on 8 devices: the quickstart's first stage.

    python -m launch.main --config=configs/sft.py \
        --config.model.path=/path/or/HF-identifier/of/llama-7b \
        --config.dataset.train_path=/path/to/train/dataset.jsonl \
        --config.dataset.valid_path=/path/to/valid/dataset.jsonl

It is the same run as `realjax sft` with the quickstart's options. The rows hold "prompt" and "answer"; the loss is
taken on answers only. Expect a line per step with a falling loss, an evaluation at the end of each of 8 epochs, a
Hugging Face checkpoint every 50 steps and at the end, and a report.html; the first lines say where. Any option can be
set as `--config.<name>=value`; `python -m realjax.apps.quickstart sft --help all` lists them.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.supervised import SFTConfig


def get_config() -> ConfigDict:
    """Returns the quickstart's values; the paths are the user's to give."""
    config: Any = to_config_dict(SFTConfig, experiment="sft")
    config.experiment_name = "quickstart-sft"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "manual"
    config.n_nodes = 1

    config.exp_ctrl.total_train_epochs = 8
    config.exp_ctrl.save_freq_steps = 50
    config.exp_ctrl.eval_freq_epochs = 1

    config.model.type._class = "llama"
    config.model.type.size = 7
    config.model.gradient_checkpointing = True
    config.model.optimizer.type = "adam"

    config.allocation.parallel.pipeline_parallel_size = 1
    config.allocation.parallel.model_parallel_size = 2
    config.allocation.parallel.data_parallel_size = 4
    config.allocation.parallel.use_sequence_parallel = True

    config.dataset.max_seqlen = 1024
    config.dataset.train_bs_n_seqs = 512
    config.dataset.valid_bs_n_seqs = 512
    return config
