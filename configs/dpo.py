"""Direct preference optimisation of a 7B Llama on 8 devices: the quickstart's stage 2.2.

    python -m launch.main --config=configs/dpo.py \
        --config.actor.path=/saved/sft/model/path \
        --config.ref.path=/saved/sft/model/path \
        --config.dataset.train_path=/path/to/train/dataset.jsonl

It is the same run as `realjax dpo` with the quickstart's options. The rows are those of reward modelling. Each step the
reference, which waits in host memory, computes its log-probabilities in a layout of its own; then the actor is trained
in another. Expect ln 2 = 0.69 as the first loss, since the two models are still the same, then a falling loss and a
growing `margin`, and a Hugging Face checkpoint of the actor every 5 steps and at the end.
"""

from typing import Any

from ml_collections import ConfigDict

from realjax.options.config_dict import to_config_dict
from realjax.options.supervised import DPOConfig


def get_config() -> ConfigDict:
    """Returns the quickstart's values; the paths are the user's to give."""
    config: Any = to_config_dict(DPOConfig, experiment="dpo")
    config.experiment_name = "quickstart-dpo"
    config.trial_name = "release"
    config.mode = "local"
    config.allocation_mode = "manual"

    config.exp_ctrl.total_train_epochs = 2
    config.exp_ctrl.save_freq_steps = 5

    for model in (config.actor, config.ref):
        model.type._class = "llama"
        model.type.size = 7

    config.actor_train.parallel.model_parallel_size = 4
    config.actor_train.parallel.data_parallel_size = 2
    config.actor_train.parallel.use_sequence_parallel = True
    config.ref_inf.parallel.model_parallel_size = 2
    config.ref_inf.parallel.data_parallel_size = 4
    config.ref_inf.parallel.use_sequence_parallel = True

    config.dataset.max_pairs_per_prompt = 2
    config.dataset.max_seqlen = 1024
    config.dataset.train_bs_n_seqs = 512
    config.dataset.valid_bs_n_seqs = 512
    return config
