"""Checks that look at more than one option, made before any device work; and the values that a run fills in itself."""

import dataclasses
from datetime import datetime
from typing import TypeVar

from realjax.core.data_paths import NEEDED, find_fault, split_paths
from realjax.options.common import CommonExperimentConfig
from realjax.options.datasets import (
    LabelledAnswerDatasetConfig,
    PairedComparisonDatasetConfig,
    PromptAnswerDatasetConfig,
    PromptOnlyDatasetConfig,
    name_sets,
)
from realjax.options.fields import find_instances
from realjax.options.model import ModelTrainEvalConfig
from realjax.options.paths import check_directory_name, find_fileroot
from realjax.options.void import list_void

Config = TypeVar("Config", bound=CommonExperimentConfig)
Kind = TypeVar("Kind")
DATASETS = (
    PromptAnswerDatasetConfig,
    PairedComparisonDatasetConfig,
    LabelledAnswerDatasetConfig,
    PromptOnlyDatasetConfig,
)
DatasetConfig = (
    PromptAnswerDatasetConfig | PairedComparisonDatasetConfig | LabelledAnswerDatasetConfig | PromptOnlyDatasetConfig
)


def resolve_names(config: Config, experiment: str) -> Config:
    """Returns `config` with experiment_name, trial_name and fileroot filled in where they are null."""
    return dataclasses.replace(
        config,
        experiment_name=f"quickstart-{experiment}" if config.experiment_name is None else config.experiment_name,
        trial_name=f"run{datetime.now():%Y-%m-%d-%H-%M-%S}" if config.trial_name is None else config.trial_name,
        fileroot=str(find_fileroot(config.fileroot)),
    )


def validate(config: CommonExperimentConfig) -> None:
    """Raises ValueError for the first thing in a resolved `config` that cannot run."""
    for name in ("experiment_name", "trial_name"):
        check_directory_name(name, getattr(config, name))
    config.check()
    for name, model in _used(config, ModelTrainEvalConfig).items():
        if not model.path:
            raise ValueError(
                f"{name}.path: nothing given; it needs a Hugging Face checkpoint directory or hub identifier"
            )
        if model.lora.is_on and model.init_from_scratch:
            raise ValueError(
                f"{name}.lora.rank: there is an adapter with init_from_scratch=True, and it belongs beside weights "
                "that are saved somewhere; leave one of them out"
            )
    for name, dataset in find_instances(config, DATASETS).items():
        _check_data_files(config, name, dataset)


def list_notices(config: CommonExperimentConfig) -> list[str]:
    """Returns a line for the log for every option whose effect here is not what its name says."""
    notices = [*config.notices(), *list_void(config)]
    for name, model in _used(config, ModelTrainEvalConfig).items():
        if model.enable_fp16:
            notices.append(
                f"{name}.enable_fp16: computing in bfloat16, which has float32's range and needs no loss scale."
            )
        # ReaL's commands hold this; a run that passed over it in silence would surprise by its memory.
        if model.optimizer.offload:
            notices.append(f"{name}.optimizer.offload has no effect: the training state stays on the devices.")
    return notices


def _used(config: CommonExperimentConfig, kind: type[Kind]) -> dict[str, Kind]:
    """Returns the models or calls of `config` that its run has, by name."""
    return {name: value for name, value in find_instances(config, kind).items() if name not in config.unused}


def _check_data_files(config: CommonExperimentConfig, name: str, dataset: DatasetConfig) -> None:
    required = "train_path" if hasattr(dataset, "train_path") else "path"
    if not getattr(dataset, required):
        raise ValueError(f"{name}.{required}: nothing given; it needs {NEEDED}")
    if config.EVALUATES and (use := config.held_out_use) is not None and not dataset.valid_path:
        option = use.partition("=")[0]
        raise ValueError(
            f"{name}.valid_path: nothing given, but {option} asks for evaluations; give {NEEDED}, or set {use}"
        )
    held_out = name_sets(dataset.valid_path, f"{name}.valid_path").values()
    training = split_paths(getattr(dataset, required))
    for option, path in (*((required, path) for path in training), *(("valid_path", path) for path in held_out)):
        if (fault := find_fault(path)) is not None:
            raise ValueError(f"{name}.{option}: '{path}' {fault}; it needs {NEEDED}")
