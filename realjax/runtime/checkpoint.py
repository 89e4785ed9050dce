"""The run's state on disk: everything a resumed run needs, in one place, saved whole or not at all."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from realjax.reshard.apply import reshard

logger = logging.getLogger("realjax.checkpoint")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What changes from step to step. Whatever a later algorithm must carry over a restart goes in here.

    The loader's position, the shuffle and all randomness follow from (seed, step), so `step` stands for them.
    """

    step: int  # steps finished
    roles: Mapping[str, Any]  # trained roles' TrainStates (or, to restore into, their abstract ones)
    counters: Mapping[str, Any] = field(default_factory=dict)  # small JSON values: the seed, controllers, best metrics
    # By role, the empty layers at the end of its stacks: a run that goes on with other pipeline stages has others.
    empty_layers: Mapping[str, int] = field(default_factory=dict)


class RunCheckpointer:
    """Saves and restores RunStates in a directory of numbered steps."""

    def __init__(self, directory: Path, max_to_keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory, options=options)
        self.directory = directory

    @property
    def latest_step(self) -> int | None:
        """The step of the last complete save, None without one."""
        return self._manager.latest_step()

    def save(self, state: RunState) -> None:
        """Copies the state off the devices and writes it in the background; a step saved before is left as it is."""
        if state.step in self._manager.all_steps():
            return
        # What was copied for the save is dropped with this dict, once it is off the devices.
        spread = {name: reshard(role, _saved_shardings(role))[0] for name, role in state.roles.items()}
        roles = {f"role_{name}": ocp.args.StandardSave(role) for name, role in spread.items()}
        run = {"step": state.step, "counters": dict(state.counters), "empty_layers": dict(state.empty_layers)}
        self._manager.save(state.step, args=ocp.args.Composite(run=ocp.args.JsonSave(run), **roles))

    def restore(self, abstract_roles: Mapping[str, Any], empty_layers: Mapping[str, int] | None = None) -> RunState:
        """Returns the last complete save, laid out as the abstract states say, with as many empty layers by role.

        Raises ValueError when there is none, or it has other arrays.
        """
        step = self.latest_step
        if step is None:
            raise ValueError(f"recover: no complete save in {self.directory}; start with recover_mode=auto or disabled")
        empty_layers = empty_layers or {}
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        roles = {}
        for name, role in abstract_roles.items():
            saved, needed = run.get("empty_layers", {}).get(name, 0), empty_layers.get(name, 0)
            _refuse_other_arrays(self.directory / str(step) / f"role_{name}", saved, role, needed)
            # Not strict, Orbax cuts off what is too much and appends zeros for what lacks: here, empty layers alone.
            wanted = _in_saved_shardings(role)
            roles[f"role_{name}"] = ocp.args.StandardRestore(wanted, strict=saved == needed)
        restored = self._manager.restore(step, args=ocp.args.Composite(**roles))
        states = {
            name: reshard(restored[f"role_{name}"], jax.tree.map(lambda leaf: leaf.sharding, role), free_source=True)[0]
            for name, role in abstract_roles.items()
        }
        logger.info("continuing after step %d, saved in %s", step, self.directory)
        return RunState(step=run["step"], roles=states, counters=run["counters"], empty_layers=empty_layers)

    def __enter__(self) -> "RunCheckpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        # Closing waits until the last save is complete, also when an error ends the run.
        self._manager.close()


def _saved_shardings(state: Any) -> Any:
    """Returns the shardings in which Orbax saves a state: its own, or over all devices where a process has no shard.

    Orbax cannot save what one of several processes lacks.
    """
    leaves = jax.tree.leaves(state)
    if all(len({d.process_index for d in leaf.sharding.device_set}) == jax.process_count() for leaf in leaves):
        return jax.tree.map(lambda leaf: leaf.sharding, state)
    mesh = Mesh(np.array(jax.devices(), dtype=object), ("all",), axis_types=(AxisType.Auto,))

    def one(leaf: Any) -> NamedSharding:
        dim = next((d for d, size in enumerate(leaf.shape) if size % mesh.size == 0), None)
        return NamedSharding(mesh, PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, "all"))

    return jax.tree.map(one, state)


def _in_saved_shardings(abstract: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        _saved_shardings(abstract),
    )


def _refuse_other_arrays(directory: Path, saved_empty: int, abstract: Any, needed_empty: int) -> None:
    # Orbax would notice too, half way through its reads, and leave them behind.
    saved = _shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(directory)).tree, saved_empty)
    needed = _shapes(abstract, needed_empty)
    differing = sorted(path for path in saved.keys() | needed.keys() if saved.get(path) != needed.get(path))
    if differing:
        first = differing[0]
        raise ValueError(
            f"recover: the save in {directory} is of another model or optimizer: {len(differing)} arrays differ, first "
            f"'{first}' (shape there {saved.get(first)}, here {needed.get(first)}); continue with those it was made "
            "with, or use another trial_name"
        )


def _shapes(tree: Any, num_empty: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a state's arrays by path, stacks of layers without their empty ones."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
    return {p: (s[0] - num_empty, *s[1:]) if "layers" in p.split("/") else s for p, s in shapes.items()}
