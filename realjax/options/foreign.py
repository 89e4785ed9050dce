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
_KL = tuple(f"{group}.kl_ctl" for group in ("ppo", "rloo", "remax", "reinforce"))
_GROUP = ("group_size", "num_samples")
_EPOCHS, _STEPS = ("exp_ctrl.total_train_epochs",), ("exp_ctrl.max_steps",)
_SAVE, _EVAL = ("exp_ctrl.save_freq_steps",), ("exp_ctrl.eval_freq_steps",)
_REMAT = ("model.gradient_checkpointing", "actor.gradient_checkpointing")
_DECAY = ("model.optimizer.weight_decay", "actor.optimizer.weight_decay")
_WARMUP = ("model.optimizer.warmup_steps_proportion", "actor.optimizer.warmup_steps_proportion")
_SCHEDULE = ("model.optimizer.lr_scheduler_type", "actor.optimizer.lr_scheduler_type")
_CLIP = ("model.optimizer.gradient_clipping", "actor.optimizer.gradient_clipping")

# By the last words of the foreign name; the first of the targets that an experiment has is meant.
FOREIGN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "optim.lr", "lr"), _LR),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size", "batch_size", "bsz"), _BATCH),
    **dict.fromkeys(("per_device_eval_batch_size", "val_batch_size"), ("dataset.valid_bs_n_seqs", *_BATCH)),
    **dict.fromkeys(("gradient_accumulation_steps", "ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu"), _MICRO),
    "ppo_max_token_len_per_gpu": _MICRO_TOKENS,
    "ppo_mini_batch_size": tuple(f"{group}.ppo_n_minibatches" for group in ("ppo", "rloo", "remax", "reinforce")),
    **dict.fromkeys(("num_train_epochs", "total_epochs", "epochs"), _EPOCHS),
    **dict.fromkeys(("total_training_steps", "total_steps", "num_steps"), _STEPS),
    **dict.fromkeys(("model_name_or_path", "model_name", "pretrain"), _MODEL),
    **dict.fromkeys(("dataset_name", "train_files", "train_file", "data_path"), _TRAIN_DATA),
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
    **dict.fromkeys(("reward_funcs", "reward_function", "custom_reward_function.name"), ("reward.fn",)),
    **dict.fromkeys(("reward_model_path", "reward_model.path", "reward_model.model.path"), ("rew.path",)),
    **dict.fromkeys(("output_dir", "default_local_dir"), ("fileroot",)),
    **dict.fromkeys(("run_name",), ("trial_name",)),
    **dict.fromkeys(("report_to", "logger"), ("wandb_mode",)),
    **dict.fromkeys(("resume_from_checkpoint", "resume_mode"), ("recover_mode",)),
    **dict.fromkeys(("tensor_model_parallel_size", "tensor_parallel_size"), ("allocation_mode",)),
    **dict.fromkeys(("nnodes",), ("n_nodes",)),
    "mask_truncated_completions": ("dataset.truncate",),
    "assistant_only_loss": ("dataset.turns",),
    "packing": (),
}


def translate(key: str, names: Iterable[str]) -> str | None:
    """Returns which of `names` an option of TRL, transformers or verl stands for; None where none does."""
    known, parts = set(names), key.split(".")
    for first in range(len(parts)):
        for target in FOREIGN.get(".".join(parts[first:]), ()):
            if target in known:
                return target
    return None
