"""Runs made from options, of any experiment: their models and data, their options, and how they begin.

An experiment that is added is covered as it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from realjax.allocation.allocate import allocate
from realjax.allocation.modes import check_options
from realjax.allocation.plan import AllocationPlan
from realjax.apps.quickstart import EXPERIMENTS
from realjax.dataflow.run import RunSpec
from realjax.options.checks import resolve_names, validate
from realjax.options.datasets import (
    LabelledAnswerDatasetConfig,
    PairedComparisonDatasetConfig,
    PromptAnswerDatasetConfig,
    PromptOnlyDatasetConfig,
)
from realjax.options.fields import find_instances
from realjax.options.model import ModelTrainEvalConfig
from realjax.options.parallel import allocation_options
from realjax.options.parsing import parse_overrides
from realjax.runtime.executor import Executor
from realjax.runtime.roles import build_roles, load_role
from tests.given.checkpoints import edit_tensors, write_llama, write_reward_model
from tests.given.texts import write_jsonl, write_rows

ROW = {"prompt": "the film was", "answer": " good and warm"}
PAIR = {"prompt": ROW["prompt"], "pos_answers": [ROW["answer"]], "neg_answers": [" bad"]}
# Tokens of a prompt, of an answer that is drawn, or of both in a row of data.
LONGEST = 8
# One draw in six or so ends an answer.
EOS_IDS = (0, *range(260, 310))
# The experiments of reinforcement learning, and the option group of each one's algorithm.
GROUPS = {"ppo": "ppo", "grpo": "ppo", "rloo": "rloo", "remax": "remax", "reinforce_pp": "reinforce"}
# Layouts of each call, as options.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one device": {"n_gpus_per_node": 1, "allocation_mode": "d1p1m1"},
    "tensor": {"n_gpus_per_node": 2, "allocation_mode": "d1p1m2"},
    "data and tensor": {"n_gpus_per_node": 4, "allocation_mode": "d2p1m2"},
    "pipeline": {"n_gpus_per_node": 2, "allocation_mode": "d1p2m1"},
    "halves": {
        "n_gpus_per_node": 4,
        "allocation_mode": "manual",
        "actor_gen.parallel.data_parallel_size": 4,
        "ref_inf.parallel.model_parallel_size": 2,
        "ref_inf.device_mesh": "NODE01:0,1",
        "rew_inf.parallel.data_parallel_size": 2,
        "rew_inf.device_mesh": "NODE01:2,3",
        "critic_inf.parallel.model_parallel_size": 4,
        "actor_train.parallel.model_parallel_size": 2,
        "actor_train.device_mesh": "NODE01:0,1",
        "critic_train.parallel.data_parallel_size": 2,
        "critic_train.device_mesh": "NODE01:2,3",
    },
}


class Given:
    """Paths in a folder: models of one tokenizer, and rows of each kind of data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Models whose answers go on and on.
        self.language_model, self.reward_model = folder / "language-model", folder / "reward-model"
        # Models whose answers often end by themselves, and which differ a little.
        self.actor, self.ref = folder / "actor", folder / "ref"
        # A few rows that are all alike.
        self.rows, self.pairs = folder / "rows.jsonl", folder / "pairs.jsonl"
        self.labelled = folder / "labelled.jsonl"
        # Rows of random words, to learn from and to be measured on: many, and a few.
        self.train, self.valid = folder / "sft-train.jsonl", folder / "sft-valid.jsonl"
        self.prompts, self.held_out = folder / "prompts.jsonl", folder / "held-out.jsonl"

    def find_data(self, dataset: Any) -> dict[str, Any]:
        """Returns the options of a dataset of this kind."""
        if isinstance(dataset, PromptOnlyDatasetConfig):
            return {"path": self.rows, "max_prompt_len": LONGEST, "train_bs_n_seqs": 4}
        kinds = {
            PromptAnswerDatasetConfig: self.rows,
            PairedComparisonDatasetConfig: self.pairs,
            LabelledAnswerDatasetConfig: self.labelled,
        }
        return {"train_path": kinds[type(dataset)], "max_seqlen": LONGEST, "train_bs_n_seqs": 4}


def write_given(folder: Path) -> Given:
    """Writes what `Given` names."""
    given = Given(folder)
    write_llama(given.language_model)
    write_reward_model(given.reward_model)
    rng = np.random.default_rng(5)
    for directory, noise in ((given.actor, 0.0), (given.ref, 0.02)):
        write_llama(directory)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_IDS}))

        def spread(tensors: dict[str, np.ndarray], noise: float = noise) -> dict[str, np.ndarray]:
            # A wide head: some tokens are much likelier than others, so that top_k and top_p matter.
            tensors["lm_head.weight"] *= 8
            return {n: x + np.float32(noise) * rng.standard_normal(x.shape, np.float32) for n, x in tensors.items()}

        edit_tensors(directory, spread)
    write_jsonl(given.rows, [ROW] * 8)
    write_jsonl(given.pairs, [PAIR] * 8)
    write_jsonl(given.labelled, [{**ROW, "label": True}, {**ROW, "answer": " bad", "label": False}] * 4)
    for path, num_rows, seed in ((given.train, 520, 1), (given.valid, 40, 2), (given.prompts, 32, 1)):
        write_rows(path, num_rows, seed)
    write_rows(given.held_out, 6, seed=2)
    return given


def list_models(experiment: str) -> dict[str, bool]:
    """Returns the models of an experiment by name, with whether they end in a scalar head."""
    models = find_instances(EXPERIMENTS[experiment].config_cls(), ModelTrainEvalConfig)
    return {name: model.is_critic for name, model in models.items()}


def make_options(experiment: str, given: Given, root: Path, **changes: Any) -> dict[str, Any]:
    """Returns the options of a small run of any experiment on one device.

    In a change's name `__` stands for a dot. None leaves an option out.
    """
    default = EXPERIMENTS[experiment].config_cls()
    options: dict[str, Any] = {
        "experiment_name": "e2e", "trial_name": "trial", "fileroot": root, "mode": "local", **LAYOUTS["one device"]
    }  # fmt: skip
    for name, is_critic in list_models(experiment).items():
        options[f"{name}.path"] = given.reward_model if is_critic else given.language_model
    for name, dataset in vars(default).items():
        if name.startswith("dataset"):
            options |= {f"{name}.{option}": value for option, value in given.find_data(dataset).items()}
    for name, group in vars(default).items():
        gen = group if name == "gen" else getattr(group, "gen", None)
        if gen is not None:
            options["gen.max_new_tokens" if name == "gen" else f"{name}.gen.max_new_tokens"] = LONGEST
        if hasattr(group, "kl_ctl"):
            options[f"{name}.kl_ctl"] = 0.1  # so that every model is used
    return _change(options, changes)


def make_rl_options(given: Given, root: Path, experiment: str = "ppo", **changes: Any) -> dict[str, Any]:
    """Returns the options of a run of reinforcement learning whose answers differ, and whose models learn.

    A change of `algo__<name>` is one of the algorithm's own options, whatever their group is called.
    """
    group, trained = GROUPS[experiment], ("actor", "critic") if experiment == "ppo" else ("actor",)
    own = {
        **{f"{model}.path": given.actor for model in list_models(experiment)},
        **{f"{model}.optimizer.lr": 0.01 for model in trained},
        **{f"{model}.gradient_checkpointing": False for model in trained},
        **({"critic.init_critic_from_actor": True} if experiment == "ppo" else {}),
        "rew.init_from_scratch": True,
        "dataset.path": given.prompts,
        "dataset.train_bs_n_seqs": 8,
        f"{group}.ppo_n_minibatches": 4,  # of two sequences, which always fit into one row: one program
        f"{group}.reward_output_scaling": 10.0,
        f"{group}.gen.top_k": 60,
        f"{group}.gen.top_p": 0.9,
        f"{group}.gen.temperature": 0.8,
    }
    named = {name.replace("__", ".").replace("algo.", f"{group}."): value for name, value in changes.items()}
    return _change(make_options(experiment, given, root) | own, named)


def _change(options: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = options | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


def build_spec(experiment: str, options: Mapping[str, Any], *, is_planned: bool = True) -> RunSpec:
    """Returns the run that the options describe, checked as the command line does it, its layouts too if they are known
    before a search.
    """
    words = [f"{name}={value}" for name, value in options.items()]
    config = resolve_names(parse_overrides(EXPERIMENTS[experiment].config_cls, words), experiment)
    validate(config)
    check_options(allocation_options(config))
    spec = EXPERIMENTS[experiment].build(config)
    if is_planned:
        make_plan(spec)
    return spec


def build_rl_spec(given: Given, root: Path, experiment: str = "ppo", **changes: Any) -> RunSpec:
    """Returns the run that `make_rl_options` describes."""
    return build_spec(experiment, make_rl_options(given, root, experiment, **changes))


def make_plan(spec: RunSpec) -> AllocationPlan:
    """Returns the plan of a run on the first of its devices."""
    return allocate(spec, jax.devices()[: spec.allocation.num_devices])


def load_executor(spec: RunSpec) -> Executor:
    """Returns the executor of a run before its first step."""
    plan = make_plan(spec)
    roles = build_roles(spec, plan)
    return Executor(spec, plan, roles, {name: load_role(role, spec.seed) for name, role in roles.items()})
