"""REINFORCE++ of a 7B Llama on 8 devices: each answer's return, normalised over all answers of a step.

    python -m launch.main --config=configs/reinforce_pp.py \
        --config.actor.path=/saved/sft/model/path \
        --config.ref.path=/saved/sft/model/path \
        --config.rew.path=/saved/rw/model/path \
        --config.dataset.path=/path/to/prompt/dataset.jsonl

The rows hold "prompt". Each step the actor answers 512 prompts once; the KL to the reference is subtracted from rewards
token by token, and each token's return is compared with the mean over the batch. Expect a first update with
`importance_weight` 1, and a growing `task_reward`.

`--config.group_size=4 --config.dataset.train_bs_n_seqs=128 --config.reinforce.use_baseline=True
--config.reinforce.kl_in=loss --config.reinforce.kl_estimator=k2` is its variant with a prompt's mean as the baseline.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import ReinforcePPConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(ReinforcePPConfig, experiment="reinforce_pp")
    config.experiment_name = "reinforce_pp"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "heuristic"

    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 512

    config.reinforce.gen.max_new_tokens = 256
    config.reinforce.gen.min_new_tokens = 0
    config.reinforce.gen.top_p = 1.0
    config.reinforce.gen.top_k = 1000
    config.reinforce.kl_ctl = 0.01
    config.reinforce.ppo_n_minibatches = 4
    return config
