"""Small runs described by hand: specs, roles, states and executors on a few devices."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from realjax.algorithms.sft import SFT_LOSS
from realjax.allocation.allocate import allocate, make_plan
from realjax.core.compute import Compute
from realjax.core.identity import Identity
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import Tree
from realjax.dataflow.graph import DataflowGraph, Train
from realjax.dataflow.run import AllocationOptions, CallPlacement, Frequency, RoleSpec, RunPaths, RunSpec
from realjax.engine.optim import Optimizer
from realjax.engine.state import TrainState, init_train_state, train_state_shardings
from realjax.hf.families import config_from_hf
from realjax.models.build import Model
from realjax.runtime import loop
from realjax.runtime.executor import Executor
from realjax.runtime.roles import Role
from tests.given.checkpoints import (
    CONFIG,
)
from tests.given.models import (
    place_params,
    random_tree,
)
from tests.given.sequences import make_loader

TRAIN = Train(name="train", role="default", inputs=("tokens", "loss_mask"), loss=SFT_LOSS)
NO_IDENTITY = Identity(fixed={}, contents={}, steering={}, harmless={})
GRAPH = DataflowGraph((TRAIN,), frozenset({"tokens", "loss_mask"}))
# For calls of any name.
ONE_DEVICE = AllocationOptions(
    mode="manual",
    n_nodes=1,
    n_gpus_per_node=1,
    calls=defaultdict(lambda: CallPlacement(strategy=ParallelStrategy())),
)


def make_paths(root: Path) -> RunPaths:
    folders = {kind: root / kind / "t" for kind in ("logs", "checkpoints", "recover")}
    return RunPaths(**folders, compilation_cache=root / "cache", plans=root / "plans")


def make_spec(paths: RunPaths, **changes) -> RunSpec:
    """Returns an SFT run on one device of a model in `model`, a directory beside the outputs."""
    role = make_role_spec("default", paths.logs.parents[1] / "model", optimizer=OptimizerConfig(lr=0.01))
    spec = RunSpec(
        experiment="sft",
        title="a test",
        config_json="{}",
        identity=NO_IDENTITY,
        paths=paths,
        graph=GRAPH,
        allocation=ONE_DEVICE,
        roles={"default": role},
        loader=make_loader(),
        num_epochs=1,
        save=Frequency(),
        evaluate=Frequency(),
        seed=1,
    )
    return replace(spec, **changes)


def make_role_spec(name: str, path: Path, **changes: Any) -> RoleSpec:
    """Returns a role of the Llama that `write_llama` writes, in `path` or still to be written there."""
    config = config_from_hf(CONFIG, "CONFIG")
    return RoleSpec(**{"name": name, "path": path, "config": config, "compute": Compute(remat=False), **changes})


def run_here(spec: RunSpec) -> int:
    """Carries out a run on the first of its devices; returns its exit code."""
    return loop.run(spec, allocate(spec, jax.devices()[: spec.allocation.num_devices]))


def make_executor(
    graph: DataflowGraph,
    layouts: Mapping[str, Layout],
    roles: Mapping[str, Role],
    states: Mapping[str, TrainState | Tree],
    **changes: Any,
) -> Executor:
    """Returns the executor of these calls in these layouts; `changes` are fields of its RunSpec."""
    specs = {name: role.spec for name, role in roles.items()}
    specs |= {name: make_role_spec(name, Path("nowhere")) for name in graph.roles if name not in specs}
    spec = make_spec(
        make_paths(Path("nowhere")), graph=graph, roles=specs, loader=make_loader(batch_size=12), **changes
    )
    return Executor(spec, make_plan(spec, layouts, jax.devices()), roles, dict(states))


def make_role(model: Model, layout: Layout, name: str = "default", *, is_trained: bool = True) -> Role:
    """Returns a role without files behind it."""
    config = OptimizerConfig(lr=0.01) if is_trained else None
    spec = RoleSpec(
        name=name, path=Path("nowhere"), config=model.config, optimizer=config, compute=Compute(remat=False)
    )
    return Role(
        spec=spec, model=model, home=layout, optimizer=Optimizer(config=config, total_updates=10) if config else None
    )


def make_state(role: Role, seed: int = 0) -> TrainState:
    """Returns a trained role's state with random parameters, before its first update."""
    assert role.optimizer is not None
    shardings = train_state_shardings(role.model, role.optimizer, role.home)
    params = place_params(role.model, random_tree(role.model, seed), role.home)
    return init_train_state(params, role.optimizer, shardings)
