"""GRPO of a small model that learns to use a calculator: conversations with a tool, on one core in minutes.

    python -m tools.environment_data --out DIR
    realjax sft experiment_name=calculator trial_name=sft mode=local model.path=DIR/calculator/model \
        model.init_from_scratch=True model.optimizer.lr=0.002 model.gradient_checkpointing=False \
        dataset.train_path=DIR/calculator/sft.jsonl dataset.max_seqlen=160 dataset.train_bs_n_seqs=32 \
        total_train_epochs=8
    python -m launch.main --config=configs/calculator.py --config.actor.path=SFT \
        --config.dataset.path=DIR/calculator/train.jsonl --config.dataset.valid_path=DIR/calculator/valid.jsonl

SFT is the checkpoint that the first command saves. The conversations that it learns from call the calculator with the
question's own expression in one of three; in the others they guess, or take another sign. Reinforcement learning finds
out what pays: `sampled/task_reward` is the share of questions answered rightly. docs/environments.md has what was
measured.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import GRPOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(GRPOConfig, experiment="grpo")
    config.experiment_name = "calculator"
    config.trial_name = "grpo"
    config.mode = "local"

    config.env.path = "realjax.environments.calculator:Calculator"
    config.env.max_turns = 4
    config.env.max_seqlen = 192

    config.group_size = 8
    config.dataset.max_prompt_len = 64
    config.dataset.train_bs_n_seqs = 16
    config.total_train_epochs = 1
    config.exp_ctrl.max_steps = 60
    config.exp_ctrl.eval_freq_steps = 20
    config.eval.greedy = False

    config.actor.optimizer.lr = 3e-4
    config.actor.gradient_checkpointing = False
    config.ppo.kl_ctl = 0.0
    config.ppo.ppo_n_minibatches = 4
    config.ppo.gen.max_new_tokens = 48
    config.ppo.gen.top_p = 1.0
    config.ppo.gen.top_k = 512
    return config
