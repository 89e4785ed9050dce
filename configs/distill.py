"""On-policy distillation of a 1B Llama from a 7B one on 8 devices: a teacher's distributions at the student's answers.

    python -m launch.main --config=configs/distill.py \
        --config.actor.path=/saved/small/model/path \
        --config.teacher.path=/saved/large/model/path \
        --config.dataset.path=/path/to/prompt/dataset.jsonl

The rows hold "prompt". Each step the actor answers 128 prompts, the teacher tells its 64 likeliest tokens at each place
of the answers, and the actor learns to be as likely to say them. Both models have one tokenizer. Expect a `loss`, the
divergence in nats a token, that falls towards 0.

Rows that hold an "answer" too can stand in for the actor's own: `--config.distill.data_share=0.5`, of half of them.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.distill import DistillConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(DistillConfig, experiment="distill")
    config.experiment_name = "distill"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "heuristic"

    config.actor.type.size = 1
    config.actor.optimizer.lr = 1e-5
    config.teacher.type.size = 7
    config.dataset.max_prompt_len = 256
    config.dataset.train_bs_n_seqs = 128

    config.distill.divergence = "reverse_kl"
    config.distill.top_k = 64
    config.distill.gen.max_new_tokens = 256
    config.distill.gen.top_p = 1.0
    config.distill.gen.top_k = 200_000
    return config
