"""PPO of a small model that learns to guess a number in three turns, on one core in minutes.

    python -m tools.environment_data --out DIR
    realjax sft experiment_name=guessing trial_name=sft mode=local model.path=DIR/guessing/model \
        model.init_from_scratch=True model.optimizer.lr=0.002 model.gradient_checkpointing=False \
        dataset.train_path=DIR/guessing/sft.jsonl dataset.max_seqlen=160 dataset.train_bs_n_seqs=32 \
        total_train_epochs=3
    python -m launch.main --config=configs/guessing.py --config.actor.path=SFT --config.critic.path=SFT \
        --config.dataset.path=DIR/guessing/train.jsonl --config.dataset.valid_path=DIR/guessing/valid.jsonl

SFT is the checkpoint that the first command saves: a player that minds the hints, and else guesses by chance. Whoever
halves what is left finds each of the 7 numbers in three guesses: `sampled/task_reward`, the share of games won, grows
towards 1. docs/environments.md has what was measured.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import PPOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(PPOConfig, experiment="ppo")
    config.experiment_name = "guessing"
    config.trial_name = "ppo"
    config.mode = "local"

    config.env.path = "realjax.environments.guessing:GuessingGame"
    config.env.max_turns = 3
    config.env.max_seqlen = 128

    config.dataset.max_prompt_len = 64
    config.dataset.train_bs_n_seqs = 120
    config.total_train_epochs = 5
    config.exp_ctrl.max_steps = 80
    config.exp_ctrl.eval_freq_steps = 20
    config.eval.greedy = False

    config.critic.init_critic_from_actor = True
    config.actor.optimizer.lr = 1e-3
    config.critic.optimizer.lr = 1e-3
    config.actor.gradient_checkpointing = False
    config.critic.gradient_checkpointing = False
    config.ppo.kl_ctl = 0.0
    config.ppo.ppo_n_minibatches = 4
    config.ppo.gen.max_new_tokens = 8
    config.ppo.gen.top_p = 1.0
    config.ppo.gen.top_k = 512
    return config
