"""What any experiment needs to start, made from its options alone: an experiment that is added is covered as it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from realjax.allocation.allocate import allocate
from realjax.allocation.modes import check_options
from realjax.apps.quickstart import EXPERIMENTS
from realjax.dataflow.run import RunSpec
from realjax.options.checks import resolve_names, validate
from realjax.options.datasets import (
    PairedComparisonDatasetConfig,
    PromptAnswerDatasetConfig,
    PromptOnlyDatasetConfig,
)
from realjax.options.fields import find_instances
from realjax.options.model import ModelTrainEvalConfig
from realjax.options.parallel import allocation_options
from realjax.options.parsing import parse_overrides
from tests.e2e.builders import write_llama

ROW = {"prompt": "the film was", "answer": " good and warm"}
PAIR = {"prompt": ROW["prompt"], "pos_answers": [ROW["answer"]], "neg_answers": [" bad"]}
LONGEST = 8


@dataclass(frozen=True, kw_only=True)
class Given:
    """A language model and a reward model of one tokenizer, and rows of each kind of data."""

    folder: Path

    @property
    def language_model(self) -> Path:
        return self.folder / "language-model"

    @property
    def reward_model(self) -> Path:
        return self.folder / "reward-model"

    def data(self, dataset: Any) -> dict[str, Any]:
        """Returns the options of a dataset of this kind."""
        if isinstance(dataset, PromptOnlyDatasetConfig):
            return {"path": self.folder / "rows.jsonl", "max_prompt_len": LONGEST, "train_bs_n_seqs": 4}
        kinds = {PromptAnswerDatasetConfig: "rows.jsonl", PairedComparisonDatasetConfig: "pairs.jsonl"}
        return {"train_path": self.folder / kinds[type(dataset)], "max_seqlen": LONGEST, "train_bs_n_seqs": 4}


def write_given(folder: Path) -> Given:
    """Writes what `Given` names."""
    given = Given(folder=folder)
    write_llama(given.language_model)
    write_reward_model(given.reward_model)
    for name, row in (("rows", ROW), ("pairs", PAIR)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row | {"id": i}) + "\n" for i in range(8)))
    return given


def write_reward_model(directory: Path, **changes: Any) -> Path:
    """Writes a Llama with a scalar head, as rw saves it."""
    write_llama(directory, architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"}, **changes)
    tensors = load_file(directory / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file({**tensors, "score.weight": head[:1].copy()}, directory / "model.safetensors", {"format": "pt"})
    return directory


def pad_rows(source: Path, directory: Path, num_rows: int) -> Path:
    """Writes a model with more rows than `source`, which no token has; those of the head are large."""
    write_llama(directory, vocab_size=num_rows)
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(7)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            old = tensors[name]
            more = rng.standard_normal((num_rows - len(old), old.shape[1])).astype(np.float32)
            tensors[name] = np.concatenate([old, 4 * more])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def options_of(experiment: str, given: Given, root: Path, **changes: Any) -> dict[str, Any]:
    """Returns the options of a small run of any experiment; `__` in a change's name stands for a dot."""
    default = EXPERIMENTS[experiment].config_cls()
    options: dict[str, Any] = {
        "experiment_name": "any", "trial_name": "trial", "fileroot": root, "mode": "local",
        "allocation_mode": "d1p1m1", "n_gpus_per_node": 1,
    }  # fmt: skip
    for name, model in find_instances(default, ModelTrainEvalConfig).items():
        options[f"{name}.path"] = given.reward_model if model.is_critic else given.language_model
    for name, dataset in vars(default).items():
        if name.startswith("dataset"):
            options |= {f"{name}.{option}": value for option, value in given.data(dataset).items()}
    for name, group in vars(default).items():
        gen = group if name == "gen" else getattr(group, "gen", None)
        if gen is not None:
            options["gen.max_new_tokens" if name == "gen" else f"{name}.gen.max_new_tokens"] = LONGEST
        if hasattr(group, "kl_ctl"):
            options[f"{name}.kl_ctl"] = 0.1  # so that every model is used
    return options | {name.replace("__", "."): value for name, value in changes.items()}


def make_spec(experiment: str, options: Mapping[str, Any]) -> RunSpec:
    """Returns the run that the options describe, checked as the command line checks it."""
    words = [f"{name}={value}" for name, value in options.items()]
    config = resolve_names(parse_overrides(EXPERIMENTS[experiment].config_cls, words), experiment)
    validate(config)
    check_options(allocation_options(config))
    spec = EXPERIMENTS[experiment].build(config)
    allocate(spec, jax.devices()[: config.n_gpus_per_node])
    return spec


def used_models(experiment: str) -> dict[str, bool]:
    """Returns the models of an experiment by name, with whether they end in a scalar head."""
    models = find_instances(EXPERIMENTS[experiment].config_cls(), ModelTrainEvalConfig)
    return {name: model.is_critic for name, model in models.items()}
