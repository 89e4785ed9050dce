"""Which options a run that continues may change: what is in neither list is refused."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce

from realjax.options.common import CommonExperimentConfig
from realjax.options.fields import list_options

# Patterns of dotted names. These change where and how a run computes and what it writes, not what it computes: of the
# paths it is the content that counts.
HARMLESS = (
    *("experiment_name", "trial_name", "fileroot", "mode", "recover_mode", "recover_retries", "wandb_*"),
    *("max_recover_saves_to_keep", "partition", "image_name", "watchdog_*", "keep_every"),
    *("allocation_mode", "n_nodes", "n_gpus_per_node", "nodelist", "max_nonfinite_steps", "output_file"),
    *("accelerator_settings", "deterministic", "allocation_use_cache", "planner.*"),
    *("exp_ctrl.save_freq_*", "exp_ctrl.eval_freq_*", "exp_ctrl.benchmark_steps"),
    *(
        "*.path",
        "*_lora_path",
        "*.lora.merge",
        "*.train_path",
        "*.valid_path",
        "*.valid_bs_n_seqs",
        "reward.classifier",
    ),
    *("dataset.split", "dataset.valid_split", "dataset.cache", "dataset.use_chat_template"),
    *("*.parallel.*", "*.n_mbs", "*.max_tokens_per_mb", "*.device_mesh", "*.num_slots", "*.tail_*"),
    *("*.prompt_lookup_num_tokens", "*.max_matching_ngram_size"),
    *("*.type.size", "*.gradient_checkpointing", "*.attention", "*.unroll_layers", "*.loss_chunk_tokens"),
    *("*.zero_stage", "*.offload", "eval.greedy", "eval.sampled", "eval.num_*"),
    *("eval.success_above", "eval.vote_fn", "rollouts.*", "samples.*"),
)
# What one changes on purpose on the way: how long a run is, and how it steps.
STEERING = ("exp_ctrl.total_train_epochs", "exp_ctrl.max_steps", "exp_ctrl.lr_schedule_epochs", "*.optimizer.*")


@dataclass(frozen=True, kw_only=True)
class SortedOptions:
    """The options of a run by what a change of them means for a run that continues."""

    fixed: dict[str, object]
    steering: dict[str, object]
    harmless: dict[str, object]


def sort_options(config: CommonExperimentConfig) -> SortedOptions:
    """Returns the options of the models and calls that the run has, and of everything else, by dotted name."""
    result = SortedOptions(fixed={}, steering={}, harmless={})
    for option in list_options(type(config)):
        if option.path.partition(".")[0] in config.unused:
            continue
        value = reduce(getattr, option.path.split("."), config)
        if any(fnmatchcase(option.path, pattern) for pattern in HARMLESS):
            result.harmless[option.path] = value
        elif any(fnmatchcase(option.path, pattern) for pattern in STEERING):
            result.steering[option.path] = value
        else:
            result.fixed[option.path] = value
    return result
