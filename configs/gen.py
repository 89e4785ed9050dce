"""Answers of a 7B Llama to a file of prompts, on 8 devices.

    python -m launch.main --config=configs/gen.py \
        --config.model.path=/path/or/HF-identifier/of/llama-7b \
        --config.dataset.path=/path/to/prompt/dataset.jsonl

It is the same run as `realjax gen` with these options. The rows hold "prompt"; there may be any number of them. Expect
a line a step with the tokens per second, and `output.jsonl` in the log directory, a line with prompt and answer for
each row of the data and in its order. Several answers: `--config.num_samples=4`. Chat models:
`--config.dataset.use_chat_template=True`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.generation import GenConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(GenConfig, experiment="gen")
    config.experiment_name = "quickstart-gen"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "manual"
    config.allocation.parallel.data_parallel_size = 8

    config.model.type._class = "llama"
    config.model.type.size = 7

    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 100

    config.gen.max_new_tokens = 1024
    config.gen.min_new_tokens = 0
    return config
