"""RLOO of a 7B Llama on 8 devices: an answer's baseline is the mean reward of the prompt's other answers.

    python -m launch.main --config=configs/rloo.py \
        --config.actor.path=/saved/sft/model/path \
        --config.ref.path=/saved/sft/model/path \
        --config.rew.path=/saved/rw/model/path \
        --config.dataset.path=/path/to/prompt/dataset.jsonl

The rows hold "prompt". Each step the actor answers 128 prompts four times and is trained once on the 512 answers; the
KL to the reference is subtracted from an answer's reward. Expect `importance_weight` 1 in every step, since sampler and
trainer are the same policy, and a growing `task_reward`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import RLOOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(RLOOConfig, experiment="rloo")
    config.experiment_name = "rloo"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "heuristic"

    config.group_size = 4
    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 128

    config.rloo.gen.max_new_tokens = 256
    config.rloo.gen.min_new_tokens = 0
    config.rloo.gen.top_p = 1.0
    config.rloo.gen.top_k = 1000
    config.rloo.kl_ctl = 0.05
    return config
