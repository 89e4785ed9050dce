"""KTO of a 7B Llama on 8 devices: preferences without pairs, from answers that are desirable or not.

    python -m launch.main --config=configs/kto.py \
        --config.actor.path=/saved/sft/model/path \
        --config.ref.path=/saved/sft/model/path \
        --config.dataset.train_path=/path/to/train/dataset.jsonl

The rows hold "prompt", "answer" and "label", true or false. Each step the reference and the actor compute their
log-probabilities, also of answers to other prompts, whose log-ratios estimate the KL that answers are compared with;
then the actor is trained. Expect 0.5 as the first loss, since the two models are still the same, then a growing
`pos_score` and a falling `neg_score`.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.supervised import KTOConfig


def get_config() -> ConfigDict:
    """Returns the recipe's values; the paths are the user's to give."""
    config: Any = to_config_dict(KTOConfig, experiment="kto")
    config.experiment_name = "kto"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "manual"

    config.exp_ctrl.total_train_epochs = 1

    for model in (config.actor, config.ref):
        model.type._class = "llama"
        model.type.size = 7
    config.actor.optimizer.lr = 5e-7

    config.actor_train.parallel.model_parallel_size = 4
    config.actor_train.parallel.data_parallel_size = 2
    config.actor_train.parallel.use_sequence_parallel = True
    config.ref_inf.parallel.model_parallel_size = 2
    config.ref_inf.parallel.data_parallel_size = 4
    config.ref_inf.parallel.use_sequence_parallel = True

    config.dataset.max_seqlen = 1024
    config.dataset.train_bs_n_seqs = 128
    config.dataset.valid_bs_n_seqs = 128
    return config
