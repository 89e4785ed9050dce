"""PPO of a 7B Llama on 8 devices: the quickstart's third stage.

    python -m launch.main --config=configs/ppo.py \
        --config.actor.path=/saved/sft/model/path \
        --config.critic.path=/saved/rw/model/path \
        --config.ref.path=/saved/sft/model/path \
        --config.rew.path=/saved/rw/model/path \
        --config.dataset.path=/path/to/prompt/dataset.jsonl

It is the same run as `realjax ppo` with the quickstart's options. The rows hold "prompt". Each step has six calls, laid
out by rule: the actor answers 128 prompts on all devices, reward model, critic and reference judge the answers, and
actor and critic are trained side by side on halves of the devices, in four minibatches; parameters move from layout to
layout in between. Expect a first step with `importance_weight` 1 and `kl` 0, then a growing `task_reward`.

As in the quickstart, `min_new_tokens` equals `max_new_tokens`: every answer has 256 tokens, and its score as if it had
ended there. To let answers end by themselves add `--config.ppo.gen.min_new_tokens=0`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import PPOConfig


def get_config() -> ConfigDict:
    """Returns the quickstart's values; the paths are the user's to give."""
    config: Any = to_config_dict(PPOConfig, experiment="ppo")
    config.experiment_name = "quickstart-ppo"
    config.trial_name = "release"
    config.allocation_mode = "heuristic"

    config.exp_ctrl.total_train_epochs = 1

    for model in (config.actor, config.critic, config.ref, config.rew):
        model.type._class = "llama"
        model.type.size = 7
    config.actor.gradient_checkpointing = True
    config.critic.gradient_checkpointing = True

    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 128

    config.ppo.gen.max_new_tokens = 256
    config.ppo.gen.min_new_tokens = 256
    config.ppo.gen.top_p = 0.9
    config.ppo.gen.top_k = 1000
    config.ppo.ppo_n_minibatches = 4
    config.ppo.kl_ctl = 0.1
    config.ppo.value_eps_clip = 0.2
    config.ppo.reward_output_scaling = 10.0
    config.ppo.adv_norm = True
    config.ppo.value_norm = True
    return config
