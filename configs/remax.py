"""ReMax of a 7B Llama on 8 devices: an answer's baseline is the reward of the prompt's greedy answer.

    python -m launch.main --config=configs/remax.py \
        --config.actor.path=/saved/sft/model/path \
        --config.rew.path=/saved/rw/model/path \
        --config.dataset.path=/path/to/prompt/dataset.jsonl

The rows hold "prompt". Each step the actor answers 256 prompts twice, drawn and greedily, the reward model scores both,
and the actor takes one step of the plain policy gradient on the drawn ones. It is ReaL's `reinforce` example; there is
no reference model unless `remax.kl_ctl` is above 0. Expect a growing `task_reward`, beside the greedy answers'
`baseline_reward`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.rl import ReMaxConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(ReMaxConfig, experiment="remax")
    config.experiment_name = "remax"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "heuristic"

    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 256

    config.remax.gen.max_new_tokens = 256
    config.remax.gen.min_new_tokens = 0
    config.remax.gen.top_p = 1.0
    config.remax.gen.top_k = 1000
    return config
