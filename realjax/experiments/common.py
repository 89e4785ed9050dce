"""Parts of a run that experiments share."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from realjax.core.data_paths import split_paths
from realjax.core.identity import Identity
from realjax.data.files import Source
from realjax.data.loader import Dataset, Loader
from realjax.data.mixture import Mixture
from realjax.data.paired import load_paired
from realjax.data.sequences import SequenceForm
from realjax.dataflow.graph import Host, Inference, Train
from realjax.dataflow.run import Evaluation, Frequency, RoleSpec, RunSpec
from realjax.experiments.adapters import adapters_of_role, share_bases, with_lora
from realjax.hf.adapters import has_head
from realjax.hf.families import find_family
from realjax.hf.files import resolve_model_path
from realjax.hf.fingerprint import fingerprint_adapter, fingerprint_model
from realjax.hf.generation import load_end_tokens
from realjax.hf.load import correct_config, has_critic_head, load_config
from realjax.models.config import ModelConfig
from realjax.options.common import CommonExperimentConfig
from realjax.options.config_dict import to_json
from realjax.options.datasets import DataOptions, LabelledAnswerDatasetConfig, PairedComparisonDatasetConfig, name_sets
from realjax.options.lora import MergedAdapter
from realjax.options.model import ModelFamily, ModelTrainEvalConfig
from realjax.options.parallel import allocation_options
from realjax.options.paths import run_paths, token_cache
from realjax.options.resume import sort_options
from realjax.options.supervised import DPOConfig, KTOConfig, PairsConfig, RWConfig, SFTConfig

logger = logging.getLogger("realjax.experiments")
Data = TypeVar("Data", bound=Dataset)


def describe_role(
    name: str, model: ModelTrainEvalConfig, *, is_trained: bool, merged: MergedAdapter | None = None
) -> RoleSpec:
    """Returns the role that one model's options describe, with adapters that are to be merged into its weights.

    Raises ValueError for a checkpoint, or adapters, that are not theirs.
    """
    option = name_option(name)
    otherwise = f", or {option}.init_from_scratch=True for random ones"
    path = resolve_model_path(model.path, need_weights=not model.init_from_scratch, or_else=otherwise)
    config = load_config(path)
    check_declared(model.type, config, path, option)
    adapters = adapters_of_role(model, option, merged)
    check_head(model, config, path, option, is_trained=is_trained, has_head=any(map(has_head, adapters)))
    check_experts(model, config, path, option)
    role = RoleSpec(
        name=name,
        path=path,
        config=find_config(name, model, config, path),
        size=model.type.size,
        init_from_scratch=model.init_from_scratch,
        init_critic_from_actor=model.init_critic_from_actor,
        compute=model.compute,
        optimizer=model.optimizer if is_trained else None,
        term_coefs=model.term_coefs,
        zero_stage=model.zero_stage_or_default if is_trained else 0,
        offload=model.offload,
        undecided=model.undecided,
    )
    return with_lora(role, model.lora, option, merged)


def name_option(role: str) -> str:
    """Returns the option that describes a role: an experiment of one model calls it `model`."""
    return "model" if role == "default" else role


def find_config(role: str, model: ModelTrainEvalConfig, config: ModelConfig, path: Path) -> ModelConfig:
    """Returns the model that a role runs: the checkpoint's, or a critic on its trunk."""
    if model.is_critic:
        return config.as_critic()
    if model.init_from_scratch:
        return config
    of_weights = correct_config(config, path)
    if of_weights.tied != config.tied:
        logger.info(
            "role %s: config.json says that the head is the embedding table, but the weights hold another head, which "
            "is kept, as in transformers; checkpoints will say so (tie_word_embeddings=false)",
            role,
        )
    return of_weights


def check_declared(declared: ModelFamily, config: ModelConfig, path: Path, option: str) -> None:
    """Raises ValueError when a model's declared kind is not that of the checkpoint at `path`."""
    family = find_family(config.family)
    if declared._class is not None and declared._class not in family.published_as:
        raise ValueError(
            f"{option}.type._class: found {declared._class}, but '{path}' holds a {family.causal_class} or its critic; "
            f"set it to {family.name}, or leave it out"
        )


def check_head(
    model: ModelTrainEvalConfig, config: ModelConfig, path: Path, option: str, *, is_trained: bool, has_head: bool
) -> None:
    """Raises ValueError for a checkpoint with a scalar head where a language model belongs, or the reverse.

    `has_head`: the adapters that belong to it have one.
    """
    subject = f"{option}.path: '{path}'"
    has_scalar_head = not model.init_from_scratch and (has_head or has_critic_head(path))
    if not model.is_critic and (has_scalar_head or config.is_critic):
        raise ValueError(
            f"{subject} is a reward model or critic, it ends in a scalar head; give a language model here, such as "
            "the one that it was made from"
        )
    if model.is_critic and not is_trained and not model.init_from_scratch:
        if not has_scalar_head:
            raise ValueError(
                f"{subject} has no scalar head, so it cannot score answers; give a reward model, such as those that rw "
                "saves"
            )
        if model.init_critic_from_actor:
            raise ValueError(
                f"{option}.init_critic_from_actor: found True, but this model is not trained, and a new head would "
                "score at random; leave it out"
            )


def check_experts(model: ModelTrainEvalConfig, config: ModelConfig, path: Path, option: str) -> None:
    """Raises ValueError for coefficients of a router's losses where the model has none."""
    if config.experts is None and any(model.term_coefs.values()):
        found = {name: getattr(model, name) for name in ("router_aux_loss_coef", "router_z_loss_coef")}
        asked = next(name for name, value in found.items() if value)
        raise ValueError(
            f"{option}.{asked}: found {found[asked]}, but '{path}' holds a {config.family} without experts; leave it "
            "out"
        )


def num_common_tokens(roles: Iterable[RoleSpec]) -> int:
    """Returns how many tokens all of the models have rows for: of one tokenizer some have more rows than others."""
    return min(role.config.vocab_size for role in roles)


def measure_loss(
    call: Train, held_out: Mapping[str, Loader], before: tuple[Inference | Host, ...] = ()
) -> dict[str, Evaluation]:
    """Returns the measure of a training call's loss on each held-out set, in micro-batches as that call's."""
    return {
        name: Evaluation(
            name=f"evaluation in the micro-batches of {call.name}",
            role=call.role,
            loss=call.loss,
            loader=loader,
            calls=before,
            micro_batches=call.micro_batches,
        )
        for name, loader in held_out.items()
    }


def make_loaders(
    config: SFTConfig | RWConfig | DPOConfig | KTOConfig | PairsConfig, train: Dataset, valid: Mapping[str, Dataset]
) -> tuple[Loader, dict[str, Loader]]:
    """Returns the loaders of the training set, and of the held-out sets."""
    loader = Loader(
        train,
        batch_size=config.dataset.train_bs_n_seqs,
        num_epochs=config.exp_ctrl.total_train_epochs,
        seed=config.seed,
    ).first_steps(config.exp_ctrl.max_steps)
    batch_size = config.dataset.valid_bs_n_seqs
    return loader, {name: load_in_order(dataset, config, batch_size) for name, dataset in valid.items()}


def load_in_order(dataset: Dataset, config: CommonExperimentConfig, batch_size: int) -> Loader:
    """Returns the loader of a held-out set."""
    return Loader(dataset, batch_size=batch_size, in_order=True, name="dataset.valid_bs_n_seqs", seed=config.seed)


def load_data(
    config: CommonExperimentConfig, data: DataOptions, option: str, load_fn: Callable[[Source], Data]
) -> Data | Mixture:
    """Returns the training data that `dataset.<option>` names: one dataset, or several mixed."""
    sources = [
        Source(
            path=path,
            name=f"dataset.{option}",
            split=data.split,
            max_rows=data.max_samples,
            cache=token_cache(config) if data.cache else None,
        )
        for path in split_paths(getattr(data, option))
    ]
    parts = tuple(map(load_fn, sources))
    return parts[0] if len(parts) == 1 else Mixture(parts=parts, weights=data.weights)


def load_held_out(
    config: CommonExperimentConfig, data: DataOptions, load_fn: Callable[[Source], Data]
) -> dict[str, Data]:
    """Returns each set that `dataset.valid_path` names, by its name, which messages have with the option's."""
    option = "dataset.valid_path"
    cache = token_cache(config) if data.cache else None
    return {
        name: load_fn(
            Source(path=path, name=f"{option} ({name})" if name else option, split=data.valid_split, cache=cache)
        )
        for name, path in name_sets(data.valid_path, option).items()
    }


def load_both(
    config: CommonExperimentConfig, data: DataOptions, load_fn: Callable[[Source], Dataset]
) -> tuple[Dataset, dict[str, Dataset]]:
    """Returns the training set, and the held-out sets by their names."""
    return load_data(config, data, "train_path", load_fn), load_held_out(config, data, load_fn)


def load_pairs(
    config: RWConfig | DPOConfig | PairsConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, Dataset]]:
    """Returns the training pairs, and the held-out pairs by the names of their sets."""
    data = config.dataset
    form, most = make_form(data), data.max_pairs_per_prompt
    return load_both(config, data, lambda source: load_paired(source, tokenizer, form, max_pairs_per_prompt=most))


def make_form(data: PairedComparisonDatasetConfig | LabelledAnswerDatasetConfig) -> SequenceForm:
    """Returns how the rows of comparisons become sequences."""
    return SequenceForm(max_seqlen=data.max_seqlen, use_chat_template=data.use_chat_template, truncate=data.truncate)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a checkpoint. Raises ValueError when it has none."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # each format has its own; that of tokenizer.json raises no narrower class
        reason = str(error).partition("\n")[0].rstrip(" :") or type(error).__name__
        raise ValueError(
            f"model path: '{path}' has no tokenizer that transformers can load ({reason}); add its files"
        ) from error


def run_spec(
    config: CommonExperimentConfig,
    *,
    experiment: str,
    roles: Mapping[str, RoleSpec],
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    contents: Mapping[str, str] | None = None,
    **parts: Any,
) -> RunSpec:
    """Returns the run of `config` on data of `tokenizer`; `parts` are the fields of RunSpec that are its own.

    `contents` are digests of what decides about the result beside the models and the training data.
    """
    control, roles = config.exp_ctrl, share_bases(roles)

    def finished(role: RoleSpec) -> RoleSpec:
        is_saved = role.optimizer is not None or role.is_averaged
        return replace(role, ends=load_end_tokens(role.path, tokenizer)) if is_saved else role

    return RunSpec(
        experiment=experiment,
        title=f"{config.experiment_name} / {config.trial_name}",
        config_json=to_json(config),
        identity=make_identity(
            config, experiment, roles, {"set of training data": loader.fingerprint, **(contents or {})}
        ),
        paths=run_paths(config),
        allocation=allocation_options(config),
        loader=loader,
        num_epochs=control.total_train_epochs,
        schedule_epochs=control.lr_schedule_epochs,
        save=Frequency(epochs=control.save_freq_epochs, steps=control.save_freq_steps, secs=control.save_freq_secs),
        evaluate=Frequency(epochs=control.eval_freq_epochs, steps=control.eval_freq_steps, secs=control.eval_freq_secs),
        seed=config.seed,
        benchmark_steps=control.benchmark_steps,
        recover_mode=config.recover_mode,
        watchdog_seconds=config.watchdog_secs,
        watchdog_compile_seconds=config.watchdog_compile_secs,
        max_recover_saves=config.max_recover_saves_to_keep,
        keep_every=config.keep_every,
        max_nonfinite_steps=config.max_nonfinite_steps,
        wandb_mode=config.wandb_mode,
        wandb_project=config.wandb_project,
        max_shard_bytes=max_shard_bytes(),
        roles={name: finished(role) for name, role in roles.items()},
        **parts,
    )


def make_identity(
    config: CommonExperimentConfig, experiment: str, roles: Mapping[str, RoleSpec], contents: Mapping[str, str]
) -> Identity:
    """Returns what a run that continues is compared with; of paths it is what lies there that counts."""
    options = sort_options(config)
    models = {
        f"model of role {name}": fingerprint_model(role.path, has_weights=not role.init_from_scratch)
        for name, role in roles.items()
    }
    for name, role in roles.items():
        models |= {f"adapter of role {name}": fingerprint_adapter(one) for one in (role.adapter, role.merged) if one}
    return Identity(
        fixed={"experiment": experiment, **options.fixed},
        contents={**models, **contents},
        steering=options.steering,
        harmless=options.harmless,
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
