"""PPO of a model of up to a billion parameters on the devices that are there, with a learned reward.

    realjax ppo --recipe ppo-small actor.path=SFT_MODEL ref.path=SFT_MODEL \
        critic.path=REWARD_MODEL rew.path=REWARD_MODEL dataset.path=prompts.jsonl

Values to start from: 64 prompts a step, four updates of their answers. The critic starts as the reward model, which
`realjax rw` makes of pairs of answers. Watch `kl`: where it runs away raise `ppo.kl_ctl` or lower `actor.optimizer.lr`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import PPOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(PPOConfig, experiment="ppo")
    config.experiment_name = "ppo-small"

    config.actor.optimizer.lr = 5e-6
    config.critic.optimizer.lr = 1e-5
    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 64

    config.ppo.gen.max_new_tokens = 128
    config.ppo.gen.min_new_tokens = 0
    config.ppo.gen.top_p = 1.0
    config.ppo.ppo_n_minibatches = 4
    config.ppo.kl_ctl = 0.05
    config.ppo.adv_norm = True
    config.ppo.value_norm = True
    return config
