"""What TRL, transformers and verl call options that have other names here: for the remedy of an unknown one."""

from collections.abc import Iterable

_BATCH = ("dataset.train_bs_n_seqs",)
_LR = ("model.optimizer.lr", "actor.optimizer.lr")
_MICRO = ("allocation.n_mbs", "actor_train.n_mbs")
_MICRO_TOKENS = ("allocation.max_tokens_per_mb", "actor_train.max_tokens_per_mb")
_MODEL = ("model.path", "actor.path")
_TRAIN_DATA = ("dataset.train_path", "dataset.path")
_ANSWER_LEN = tuple(f"{group}.gen.max_new_tokens" for group in ("ppo", "rloo", "remax", "reinforce", "distill"))
_ANSWER_LEN = (*_ANSWER_LEN, "gen.max_new_tokens")
_RL = ("ppo", "rloo", "remax", "reinforce")
_KL = tuple(f"{group}.kl_ctl" for group in _RL)
_UPDATES = tuple(f"{group}.ppo_n_minibatches" for group in _RL)
_GROUP = ("group_size", "num_samples")
_EPOCHS, _STEPS = ("exp_ctrl.total_train_epochs",), ("exp_ctrl.max_steps",)
_SAVE, _EVAL = ("exp_ctrl.save_freq_steps",), ("exp_ctrl.eval_freq_steps",)
_REMAT = ("model.gradient_checkpointing", "actor.gradient_checkpointing")
_DECAY = ("model.optimizer.weight_decay", "actor.optimizer.weight_decay")
_WARMUP = ("model.optimizer.warmup_steps_proportion", "actor.optimizer.warmup_steps_proportion")
_SCHEDULE = ("model.optimizer.lr_scheduler_type", "actor.optimizer.lr_scheduler_type")
_CLIP = ("model.optimizer.gradient_clipping", "actor.optimizer.gradient_clipping")

_DTYPE = ("model.enable_bf16", "actor.enable_bf16")
_RANK = ("model.lora.rank", "actor.lora.rank")

# By the last words of the foreign name; the first of the targets that an experiment has is meant.
FOREIGN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "optim.lr", "lr"), _LR),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size", "batch_size", "bsz"), _BATCH),
    **dict.fromkeys(("per_device_eval_batch_size", "val_batch_size"), ("dataset.valid_bs_n_seqs", *_BATCH)),
    **dict.fromkeys(("gradient_accumulation_steps", "ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu"), _MICRO),
    "ppo_max_token_len_per_gpu": _MICRO_TOKENS,
    **dict.fromkeys(("ppo_mini_batch_size", "steps_per_generation"), _UPDATES),
    **dict.fromkeys(("num_train_epochs", "total_epochs", "epochs"), _EPOCHS),
    **dict.fromkeys(("total_training_steps", "total_steps", "num_steps"), _STEPS),
    **dict.fromkeys(("model_name_or_path", "model_name", "pretrain", "model", "actor_rollout_ref.model.path"), _MODEL),
    "critic.model.path": ("critic.path",),
    **dict.fromkeys(("dataset_name", "dataset", "train_files", "train_file", "data_path"), _TRAIN_DATA),
    **dict.fromkeys(("dataset.path", "dataset.train_path"), _TRAIN_DATA),
    **dict.fromkeys(("bf16", "torch_dtype", "dtype"), _DTYPE),
    **dict.fromkeys(("lora_r", "lora_rank", "peft_config.r", "use_peft", "use_lora"), _RANK),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "zero_stage"), ("model.zero_stage", "actor.zero_stage")),
    "fp16": ("model.enable_fp16", "actor.enable_fp16"),
    "attn_implementation": ("model.attention", "actor.attention"),
    **dict.fromkeys(("eval_dataset", "val_files", "eval_file"), ("dataset.valid_path",)),
    **dict.fromkeys(("dataset_train_split", "train_split"), ("dataset.split",)),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len"), ("dataset.max_seqlen", "dataset.max_prompt_len")),
    "max_prompt_length": ("dataset.max_prompt_len",),
    **dict.fromkeys(("max_completion_length", "response_length", "max_response_length", "max_tokens"), _ANSWER_LEN),
    **dict.fromkeys(("num_generations", "rollout.n"), _GROUP),
    **dict.fromkeys(("beta", "kl_coef", "kl_loss_coef", "init_kl_coef"), ("beta", *_KL)),
    **dict.fromkeys(("epsilon", "clip_ratio", "cliprange"), tuple(f"{g}.eps_clip" for g in ("ppo", "rloo", "remax"))),
    "num_ppo_epochs": ("ppo.ppo_epochs",),
    "num_iterations": ("ppo.ppo_epochs",),
    **dict.fromkeys(("save_steps", "save_freq"), _SAVE),
    **dict.fromkeys(("eval_steps", "test_freq"), _EVAL),
    "weight_decay": _DECAY,
    **dict.fromkeys(("warmup_ratio", "warmup_steps", "lr_warmup_steps_ratio"), _WARMUP),
    "lr_scheduler_type": _SCHEDULE,
    **dict.fromkeys(("max_grad_norm", "grad_clip"), _CLIP),
    **dict.fromkeys(("gradient_checkpointing", "enable_gradient_checkpointing"), _REMAT),
    **dict.fromkeys(("reward_funcs", "reward_weights", "reward_function"), ("reward.fn",)),
    **dict.fromkeys(("reward_model_path", "reward_model.path", "reward_model.model.path"), ("rew.path",)),
    **dict.fromkeys(("output_dir", "default_local_dir"), ("fileroot",)),
    **dict.fromkeys(("run_name",), ("trial_name",)),
    **dict.fromkeys(("report_to", "logger"), ("wandb_mode",)),
    **dict.fromkeys(("resume_from_checkpoint", "resume_mode"), ("recover_mode",)),
    **dict.fromkeys(("tensor_model_parallel_size", "tensor_parallel_size"), ("allocation_mode",)),
    **dict.fromkeys(("nnodes",), ("n_nodes",)),
    "mask_truncated_completions": ("ppo.mask_truncated",),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), ("dataset.turns",)),
    **dict.fromkeys(("loss_agg_mode", "loss_type"), tuple(f"{group}.loss_aggregation" for group in _RL)),
    **dict.fromkeys(("scale_rewards", "norm_adv_by_std_in_grpo"), ("ppo.scale_by_std",)),
    "importance_sampling_level": ("ppo.surrogate",),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha"), ("ppo.ref_ema_eta",)),
    "log_completions": ("rollouts.log_freq_steps",),
    "max_num_seqs": tuple(f"{group}.gen.num_slots" for group in _RL),
    "use_dynamic_bsz": _MICRO_TOKENS,
    "clip_ratio_c": ("ppo.dual_clip",),
    **dict.fromkeys(("use_kl_loss", "use_kl_in_reward"), ("ppo.kl_in",)),
    "kl_loss_type": ("ppo.kl_estimator",),
    "gamma": ("ppo.discount",),
    "lam": ("ppo.gae_lambda",),
    "filter_groups": ("ppo.max_draws",),
    "rollout_correction": ("ppo.correction.kind",),
    **dict.fromkeys(("custom_reward_function.path", "custom_reward_function.name"), ("reward.fn",)),
    "project_name": ("wandb_project",),
}
# What counts something else than the option that stands for it.
DIFFERENCES = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size"), "it counts the sequences of all devices together"
    ),
    "gradient_accumulation_steps": "it cuts the batch of a step into so many parts, and the batch stays as large",
    "ppo_mini_batch_size": "it is a number of updates, and not of samples",
    "ppo_micro_batch_size": "it is a number of parts, and not of samples",
    "warmup_steps": "it is a share of all steps",
    **dict.fromkeys(("deepspeed", "fsdp"), "it is ZeRO's stage, from 0 to 3"),
    "use_dynamic_bsz": "it counts the tokens of all devices together",
    "custom_reward_function.path": "it is <module>:<function>",
    "reward_weights": "parts of a reward are weighted and added in it",
    "use_peft": "it is the rank of the adapters",
    "tensor_model_parallel_size": "it says all sizes at once, such as d2p1m4",
    "tensor_parallel_size": "it says all sizes at once, such as d2p1m4",
}
# What has no option here, and why.
WITHOUT_OPTION = {
    "adv_estimator": "the experiment is the algorithm: realjax ppo, grpo, rloo, remax, reinforce_pp",
    **dict.fromkeys(
        ("use_vllm", "vllm_mode", "gpu_memory_utilization", "rollout.name", "vllm_gpu_memory_utilization"),
        "answers are generated by the training's own programs, so leave it out",
    ),
    "optim": "leave it out; models learn by AdamW, whose options are those of optimizer",
    "logging_steps": "leave it out; each step has its line",
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit"),
        "leave it out; weights are not quantised, and lora.rank=16 of a model saves most",
    ),
    "dataset_text_field": "leave it out; rows are read by their keys, and text is one of them (docs/data.md)",
    **dict.fromkeys(
        ("packing", "padding_free", "use_remove_padding"), "leave it out; rows are always packed, without padding"
    ),
    "precompute_ref_log_probs": "leave it out; the reference waits in host memory between its calls",
    "remove_unused_columns": "leave it out; keys that nobody reads do no harm",
    "do_train": "leave it out; the experiment trains",
}


def translate(key: str, names: Iterable[str]) -> str | None:
    """Returns which of `names` an option of TRL, transformers or verl stands for; None where none does."""
    known = set(names)
    return next((target for end in _ends(key) for target in FOREIGN.get(end, ()) if target in known), None)


def explain(key: str) -> str | None:
    """Returns in what the option here differs, or why there is none; None where nothing is to be said."""
    notes = WITHOUT_OPTION | DIFFERENCES
    return next((notes[end] for end in _ends(key) if end in notes), None)


def _ends(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]
