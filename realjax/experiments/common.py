"""Parts of a run that experiments share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from realjax.core.layout import Layout
from realjax.dataflow.run import Frequency, RoleSpec, RunSpec
from realjax.hf.files import resolve_model_path
from realjax.options.common import CommonExperimentConfig
from realjax.options.config_dict import to_json
from realjax.options.model import ModelTrainEvalConfig
from realjax.options.parallel import MFCConfig, resolve_parallelism
from realjax.options.paths import run_paths


def role_spec(name: str, model: ModelTrainEvalConfig, devices: Sequence[jax.Device], *, is_trained: bool) -> RoleSpec:
    """Returns the role that the options of one model describe."""
    dtype = model.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    return RoleSpec(
        name=name,
        path=resolve_model_path(model.path, need_weights=not model.init_from_scratch),
        is_critic=model.is_critic,
        init_from_scratch=model.init_from_scratch,
        init_critic_from_actor=model.init_critic_from_actor,
        compute_dtype=dtype,
        attention=model.attention,
        remat=model.gradient_checkpointing,
        loss_chunk_tokens=model.loss_chunk_tokens,
        optimizer=model.optimizer if is_trained else None,
    )


def call_layout(
    config: CommonExperimentConfig,
    call: MFCConfig,
    model: ModelTrainEvalConfig,
    devices: Sequence[jax.Device],
    *,
    is_train: bool,
) -> Layout:
    """Returns where a call runs under the run's allocation mode."""
    sizes = resolve_parallelism(
        config.allocation_mode,
        call.parallel,
        n_nodes=config.n_nodes,
        n_gpus_per_node=config.n_gpus_per_node,
        is_train=is_train,
    )
    return Layout(sizes.strategy(model.zero_stage if is_train else 0), tuple(devices))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a checkpoint. Raises ValueError when it has none."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(" :")
        raise ValueError(
            f"model path: '{path}' has no tokenizer that transformers can load ({reason}); add its files"
        ) from error


def run_spec(config: CommonExperimentConfig, *, experiment: str, **parts: Any) -> RunSpec:
    """Returns the run of `config`; `parts` are the fields of RunSpec that an experiment decides itself."""
    control = config.exp_ctrl
    paths = run_paths(config)
    return RunSpec(
        experiment=experiment,
        title=f"{config.experiment_name} / {config.trial_name}",
        config_json=to_json(config),
        paths=paths,
        num_epochs=control.total_train_epochs,
        save=Frequency(epochs=control.save_freq_epochs, steps=control.save_freq_steps, secs=control.save_freq_secs),
        evaluate=Frequency(epochs=control.eval_freq_epochs, steps=control.eval_freq_steps, secs=control.eval_freq_secs),
        seed=config.seed,
        benchmark_steps=control.benchmark_steps,
        recover_mode=config.recover_mode,
        max_recover_saves=config.max_recover_saves_to_keep,
        max_nonfinite_steps=config.max_nonfinite_steps,
        wandb_mode=config.wandb_mode,
        max_shard_bytes=max_shard_bytes(),
        **parts,
    )


def max_shard_bytes() -> float:
    """Returns the largest checkpoint file in bytes: REALJAX_SAVE_MAX_SHARD_SIZE_BYTE, ReaL's name of it, or 5e9."""
    for name in ("REALJAX_SAVE_MAX_SHARD_SIZE_BYTE", "REAL_SAVE_MAX_SHARD_SIZE_BYTE"):
        if text := os.environ.get(name):
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"{name}: found {text!r}; it needs a number of bytes, such as 5e9") from None
    return 5e9
