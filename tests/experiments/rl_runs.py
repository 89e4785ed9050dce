"""Runs of reinforcement learning on a tiny model and a few prompts: their inputs, their options, and their steps."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from realjax.allocation.allocate import allocate
from realjax.allocation.modes import check_options
from realjax.allocation.plan import AllocationPlan
from realjax.apps.quickstart import EXPERIMENTS
from realjax.core.metrics import summarize
from realjax.dataflow.run import RunSpec
from realjax.options.checks import resolve_names, validate
from realjax.options.parallel import allocation_options
from realjax.options.parsing import parse_overrides
from realjax.runtime.executor import Executor
from realjax.runtime.roles import build_roles, load_role
from tests.e2e.builders import write_llama, write_rows

NEW = 8
# One draw in six or so ends an answer.
EOS_IDS = (0, *range(260, 310))
# The option group of each algorithm.
GROUPS = {"ppo": "ppo", "grpo": "ppo", "rloo": "rloo", "remax": "remax"}
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


@dataclass(frozen=True, kw_only=True)
class RLInputs:
    """Paths of a language model, another one of its tokenizer, and prompts to learn from and to be measured on."""

    actor: Path
    ref: Path
    prompts: Path
    held_out: Path


def write_rl_inputs(folder: Path) -> RLInputs:
    """Writes two random Llamas whose answers often end by themselves, and rows of a few words with an `id`."""
    inputs = RLInputs(
        actor=write_llama(folder / "actor"),
        ref=write_llama(folder / "ref"),
        prompts=write_rows(folder / "prompts.jsonl", 32, seed=1),
        held_out=write_rows(folder / "held-out.jsonl", 6, seed=2),
    )
    rng = np.random.default_rng(5)
    for directory, noise in ((inputs.actor, 0.0), (inputs.ref, 0.02)):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_IDS}))
        tensors = load_file(directory / "model.safetensors")
        # A wide head: some tokens are much likelier than others, so that top_k and top_p matter.
        tensors["lm_head.weight"] *= 8
        noisy = {n: x + np.float32(noise) * rng.standard_normal(x.shape, np.float32) for n, x in tensors.items()}
        save_file(noisy, directory / "model.safetensors", metadata={"format": "pt"})
    return inputs


def rl_options(inputs: RLInputs, root: Path, experiment: str = "ppo", **changes: Any) -> dict[str, Any]:
    """Returns the options of a run on one device; `__` in a change's name stands for a dot, None leaves one out.

    A change of `algo__<name>` is one of the algorithm's own options, whatever their group is called.
    """
    critic = {
        "critic.path": inputs.actor,
        "critic.init_critic_from_actor": True,
        "critic.optimizer.lr": 0.01,
        "critic.gradient_checkpointing": False,
    }
    algorithm = {
        "ppo_n_minibatches": 4,  # of two sequences, which always fit into one row: one program
        "kl_ctl": 0.1,
        "reward_output_scaling": 10.0,
        "gen.max_new_tokens": NEW,
        "gen.top_k": 60,
        "gen.top_p": 0.9,
        "gen.temperature": 0.8,
    }
    options = {
        "experiment_name": "e2e",
        "trial_name": "trial",
        "fileroot": root,
        "mode": "local",
        **LAYOUTS["one device"],
        "actor.path": inputs.actor,
        "actor.optimizer.lr": 0.01,
        "actor.gradient_checkpointing": False,
        "ref.path": inputs.actor,
        "rew.path": inputs.actor,
        "rew.init_from_scratch": True,
        **(critic if experiment == "ppo" else {}),
        "dataset.path": inputs.prompts,
        "dataset.max_prompt_len": 8,
        "dataset.train_bs_n_seqs": 8,
        **{f"algo.{name}": value for name, value in algorithm.items()},
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    group = GROUPS[experiment]
    return {name.replace("algo.", f"{group}."): value for name, value in options.items() if value is not None}


def make_rl_spec(inputs: RLInputs, root: Path, experiment: str = "ppo", **changes: Any) -> RunSpec:
    """Returns the run that the options describe, checked as the command line does it, its layouts too."""
    words = [f"{name}={value}" for name, value in rl_options(inputs, root, experiment, **changes).items()]
    config = resolve_names(parse_overrides(EXPERIMENTS[experiment].config_cls, words), experiment)
    validate(config)
    check_options(allocation_options(config))
    spec = EXPERIMENTS[experiment].build(config)
    make_rl_plan(spec)
    return spec


def make_rl_plan(spec: RunSpec) -> AllocationPlan:
    """Returns the plan of a run on the first of its devices."""
    return allocate(spec, jax.devices()[: spec.allocation.num_devices])


def make_executor(spec: RunSpec) -> Executor:
    """Returns the executor of a run before its first step."""
    plan = make_rl_plan(spec)
    roles = build_roles(spec, plan)
    return Executor(spec, plan, roles, {name: load_role(role, spec.seed) for name, role in roles.items()})


def as_numbers(updates: list[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns a call's metrics as plain numbers, one dict for each update."""
    return [summarize([update]) for update in updates]


@contextmanager
def quick_compiles() -> Iterator[None]:
    """Compiles without most of XLA's optimisations: tiny programs that run a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
