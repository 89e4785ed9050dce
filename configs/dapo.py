"""DAPO of a 7B Llama on 8 devices: GRPO with dynamic sampling, clip-higher, a mean over tokens and overlong shaping.

    python -m launch.main --config=configs/dapo.py \
        --config.actor.path=/saved/sft/model/path \
        --config.dataset.path=/path/to/prompt/dataset.jsonl \
        --config.reward.fn=realjax.rewards.verifiable:number_reward

The rows hold "prompt" and what the reward reads, such as "answer". Each step draws prompts, 16 answers to each, until
64 prompts have answers of different rewards, in ten draws at most. Expect `uniform_group_share` 0, `batch_filled` 1
and a growing `drawn_reward`; `informative_share` and `draws` say what a step had to draw for it.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import GRPOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(GRPOConfig, experiment="grpo")
    config.experiment_name = "dapo"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "heuristic"

    config.actor.optimizer.lr = 1e-6
    config.actor.optimizer.lr_scheduler_type = "constant"
    config.group_size = 16
    config.dataset.max_prompt_len = 512
    config.dataset.train_bs_n_seqs = 64

    config.ppo.gen.max_new_tokens = 2048
    config.ppo.gen.top_p = 1.0
    config.ppo.gen.top_k = 200_000
    config.ppo.kl_ctl = 0.0
    config.ppo.ppo_n_minibatches = 16
    config.ppo.eps_clip = 0.2
    config.ppo.eps_clip_high = 0.28
    config.ppo.loss_aggregation = "token"
    config.ppo.drop_uniform_groups = True
    config.ppo.max_draws = 10
    config.ppo.overlong_penalty = 1.0
    config.ppo.overlong_buffer_len = 512
    return config
