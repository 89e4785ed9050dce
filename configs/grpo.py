"""GRPO of a 7B Llama on 8 devices: advantages from four answers to each prompt, no critic.

    python -m launch.main --config=configs/grpo.py \
        --config.actor.path=/saved/sft/model/path \
        --config.ref.path=/saved/sft/model/path \
        --config.rew.path=/saved/rw/model/path \
        --config.dataset.path=/path/to/prompt/dataset.jsonl

The rows hold "prompt". Each step the actor answers 128 prompts four times, the reward model scores the 512 answers, and
the actor learns from each score's distance to its prompt's mean, with the KL to the reference as a part of the loss.
Expect a first update with `importance_weight` 1, then a growing `task_reward`.

Rewards can be computed instead of learned: leave out `rew.path`, give rows a reference "answer" and add
`--config.reward.fn=realjax.rewards.verifiable:number_reward`. Variants: `--config.ppo.scale_by_std=False
--config.ppo.loss_aggregation=constant --config.ppo.kl_ctl=0` is Dr. GRPO, which needs no reference; DAPO is
`configs/dapo.py`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import GRPOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(GRPOConfig, experiment="grpo")
    config.experiment_name = "grpo"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "heuristic"

    config.group_size = 4
    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 128

    config.ppo.gen.max_new_tokens = 256
    config.ppo.gen.min_new_tokens = 0
    config.ppo.gen.top_p = 1.0
    config.ppo.gen.top_k = 1000
    config.ppo.kl_ctl = 0.05
    config.ppo.ppo_n_minibatches = 4
    return config
