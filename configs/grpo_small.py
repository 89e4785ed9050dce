"""GRPO of a model of up to a billion parameters on the devices that are there, with a reward that is computed.

    realjax grpo --recipe grpo-small actor.path=MODEL ref.path=MODEL \
        reward.fn=realjax.rewards.verifiable:number_reward dataset.path=prompts.jsonl

Values to start from: eight answers to each of 16 prompts, two updates of them. The rows hold "prompt" and what the
reward reads, here "answer". Where all answers to a prompt get the same reward nothing is learned from it: then begin
with a better model, or with easier prompts.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import GRPOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(GRPOConfig, experiment="grpo")
    config.experiment_name = "grpo-small"

    config.group_size = 8
    config.actor.optimizer.lr = 5e-6
    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 16

    config.ppo.gen.max_new_tokens = 256
    config.ppo.gen.min_new_tokens = 0
    config.ppo.gen.top_p = 1.0
    config.ppo.kl_ctl = 0.02
    config.ppo.ppo_n_minibatches = 2
    return config
