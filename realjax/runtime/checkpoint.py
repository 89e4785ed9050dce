"""The run's state on disk: everything a resumed run needs, in one place, saved whole or not at all."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from realjax.core.faults import removed
from realjax.core.json_text import JsonObject
from realjax.core.manifest import find_damage, write_manifest
from realjax.core.processes import from_first, is_first, largest
from realjax.core.trees import Tree
from realjax.engine.state import TrainState
from realjax.reshard.apply import reshard

logger = logging.getLogger("realjax.checkpoint")
TIMES = "_CHECKPOINT_METADATA"  # of the save; Orbax writes the last of them after all else, and nobody reads them
ROLLOUTS = "rollouts"  # the item of a save with the rows in flight
# The others wait for so long until the first process has sealed a save; that it is lost, the coordinator tells earlier.
SEAL_SECONDS = 7 * 24 * 3600
UNFINISHED = ".orbax-checkpoint-tmp"  # what Orbax appends to the name of a save in the making


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What changes from step to step. Whatever a later algorithm must carry over a restart goes in here.

    The loader's position, the shuffle and all randomness follow from (seed, step), so `step` stands for them.
    """

    step: int  # steps finished
    roles: Mapping[str, TrainState | Tree]  # trained roles' TrainStates (or, to restore into, their abstract ones)
    counters: JsonObject = field(default_factory=dict)  # small values: the seed, controllers, best metrics
    # By role, the empty layers at the end of its stacks: a run that goes on with other pipeline stages has others.
    empty_layers: Mapping[str, int] = field(default_factory=dict)
    # Of rows that were drawn or begun for steps to come, see `runtime.flight.flatten_rows`.
    rollouts: Mapping[str, np.ndarray] = field(default_factory=dict)


class RunCheckpointer:
    """Saves RunStates in a directory of numbered steps, each with a manifest, in the background."""

    def __init__(self, directory: Path, max_to_keep: int, keep_every: int | None = None) -> None:
        self.directory, self.max_to_keep, self.keep_every = directory, max_to_keep, keep_every
        # Called in the first process when all is written, before the directory gets its name: what has a name is whole.
        options = ocp.options.AsyncOptions(post_finalization_callback=self._seal, timeout_secs=SEAL_SECONDS)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._step: int | None = None  # of the save under way
        self._before_fn = self._after_fn = _nothing

    @property
    def latest_step(self) -> int | None:
        """The step of the last complete save, None without one."""
        return max(saved_steps(self.directory), default=None)

    def save(
        self,
        state: RunState,
        after_fn: Callable[[], None] | None = None,
        *,
        before_fn: Callable[[], None] | None = None,
    ) -> None:
        """Copies the state off the devices and writes it in the background; a step saved before is left as it is.

        Both functions are called in the first process: `before_fn`, in another thread, before the save counts, which
        may wait for what belongs to it; `after_fn` once it is complete (see `settle`).
        """
        self.wait()
        path = self.directory / str(state.step)
        if path.exists():
            return
        # What was copied for the save is dropped with this dict, once it is off the devices.
        spread = {name: reshard(role, _saved_shardings(role))[0] for name, role in state.roles.items()}
        roles = {f"role_{name}": ocp.args.StandardSave(role) for name, role in spread.items()}
        run = {"step": state.step, "counters": dict(state.counters), "empty_layers": dict(state.empty_layers)}
        run["has_rollouts"] = bool(state.rollouts)
        rollouts = {ROLLOUTS: ocp.args.StandardSave(dict(state.rollouts))} if state.rollouts else {}
        self._step, self._before_fn, self._after_fn = state.step, before_fn or _nothing, after_fn or _nothing
        with self._no_users_errors():
            self._checkpointer.save(path, args=ocp.args.Composite(run=ocp.args.JsonSave(run), **roles, **rollouts))

    def wait(self) -> None:
        """Returns when the save under way is complete, and settled."""
        with self._no_users_errors():
            self._checkpointer.wait_until_finished()
        self.settle()

    def settle(self) -> None:
        """Does what waits for the save under way, if that is complete: older ones than are kept go, `after_fn` runs.

        Never before: what the save stands in for must be there until then. Raises what the save raised.
        """
        with self._no_users_errors():
            self._checkpointer.check_for_errors()
        if self._step is None or not (self.directory / str(self._step)).is_dir():
            return
        self._step = None
        if is_first():
            drop_oldest(self.directory, self.max_to_keep, self.keep_every)
            self._after_fn()

    def _seal(self) -> None:
        self._before_fn()
        (temporary,) = self.directory.glob(f"{self._step}{UNFINISHED}*")
        write_manifest(temporary, left_out=TIMES)

    def __enter__(self) -> "RunCheckpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        # Closing waits until the last save is complete, also when an error ends the run.
        with self._no_users_errors():
            self._checkpointer.close()
        self.settle()

    @contextmanager
    def _no_users_errors(self) -> Iterator[None]:
        """While entered, a ValueError of Orbax's, which would pass for a user's, becomes another error.

        A file that it misses is mostly one of a directory that was removed meanwhile: then that is said.
        """
        try:
            yield
        except ValueError as error:
            if not self.directory.is_dir():
                raise removed(self.directory) from error
            raise RuntimeError(f"{self.directory}: step {self._step} could not be saved") from error


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps of the saves there; one in the making has a longer name than its step."""
    return [int(path.name) for path in directory.glob("*") if path.name.isdigit()]


def drop_oldest(directory: Path, max_to_keep: int, keep_every: int | None = None) -> None:
    """Removes all saves but the newest, which are whole, and those after every `keep_every` steps."""
    for step in sorted(saved_steps(directory))[:-max_to_keep]:
        if keep_every is None or step % keep_every:
            shutil.rmtree(directory / str(step))


def find_save(directory: Path) -> RunState | None:
    """Returns the newest whole save, its roles left on the disk, or None where there is none at all.

    Every process calls this, and checks its share of the files. One that is not whole is passed over with a warning.
    Raises ValueError when none of the saves is whole.
    """
    num_saves = int(from_first(len(saved_steps(directory))))
    for number in range(num_saves):
        # The first process's view: another's may lag behind on a shared disk.
        steps = sorted(saved_steps(directory), reverse=True)
        step = int(from_first(steps[number] if is_first() else 0))
        share = {"share": jax.process_index(), "num_shares": jax.process_count()}
        damage = find_damage(directory / str(step), **share)
        if damage:
            logger.warning("the save %s is passed over: %s", directory / str(step), damage)
        if not largest(int(damage is not None)):
            run = _restore_items(directory / str(step), run=ocp.args.JsonRestore())["run"]
            rollouts = _restore_rollouts(directory / str(step)) if run.get("has_rollouts") else {}
            empty_layers = run.get("empty_layers", {})
            return RunState(step=step, roles={}, counters=run["counters"], empty_layers=empty_layers, rollouts=rollouts)
    if num_saves:
        raise ValueError(
            f"recover: {directory} holds {num_saves} saves, of which none is whole; set recover_mode=disabled to start "
            "anew, which keeps them aside, or use another trial_name"
        )
    return None


def refuse_other_arrays(
    directory: Path, save: RunState, abstract_roles: Mapping[str, TrainState | Tree], empty_layers: Mapping[str, int]
) -> None:
    """Raises ValueError when the save's arrays are not those of the roles. Orbax would notice half way through."""
    for name, role in abstract_roles.items():
        saved, needed = save.empty_layers.get(name, 0), empty_layers.get(name, 0)
        _refuse_other_arrays(directory / str(save.step) / f"role_{name}", saved, role, needed)


def restore(
    directory: Path, save: RunState, abstract_roles: Mapping[str, TrainState | Tree], empty_layers: Mapping[str, int]
) -> RunState:
    """Returns the save with its roles, laid out as the abstract states say, with as many empty layers by role.

    Raises ValueError when it has other arrays.
    """
    refuse_other_arrays(directory, save, abstract_roles, empty_layers)
    # Not strict, Orbax cuts off what is too much and appends zeros for what lacks: here, empty layers alone.
    items = {
        f"role_{name}": ocp.args.StandardRestore(
            _in_saved_shardings(role), strict=save.empty_layers.get(name, 0) == empty_layers.get(name, 0)
        )
        for name, role in abstract_roles.items()
    }
    restored = _restore_items(directory / str(save.step), **items)
    states = {
        name: reshard(restored[f"role_{name}"], jax.tree.map(lambda leaf: leaf.sharding, role), free_source=True)[0]
        for name, role in abstract_roles.items()
    }
    logger.info("continuing after step %d, saved in %s", save.step, directory)
    return replace(save, roles=states, empty_layers=empty_layers)


def clear_after(directory: Path, step: int) -> None:
    """Makes room for saves after `step`: what is there under such names is not whole, and becomes `<step>.damaged`."""
    for later in saved_steps(directory):
        if later > step:
            aside = directory / f"{later}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (directory / str(later)).rename(aside)
    for unfinished in directory.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(unfinished)


def _restore_items(path: Path, **items: ocp.args.CheckpointArgs) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**items))


def _restore_rollouts(path: Path) -> dict[str, np.ndarray]:
    restored = _restore_items(path, **{ROLLOUTS: ocp.args.StandardRestore()})[ROLLOUTS]
    return {name: np.asarray(array) for name, array in restored.items()}


def _nothing() -> None:
    """Does nothing."""


def _saved_shardings(state: object) -> Any:
    """Returns the shardings in which Orbax saves a state: its own, or over all devices where a process has no shard.

    Orbax cannot save what one of several processes lacks.
    """
    leaves = jax.tree.leaves(state)
    if all(len({d.process_index for d in leaf.sharding.device_set}) == jax.process_count() for leaf in leaves):
        return jax.tree.map(lambda leaf: leaf.sharding, state)
    mesh = Mesh(np.array(jax.devices(), dtype=object), ("all",), axis_types=(AxisType.Auto,))

    def one(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        dim = next((d for d, size in enumerate(leaf.shape) if size % mesh.size == 0), None)
        return NamedSharding(mesh, PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, "all"))

    return jax.tree.map(one, state)


def _in_saved_shardings(abstract: object) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        _saved_shardings(abstract),
    )


def _refuse_other_arrays(directory: Path, saved_empty: int, abstract: object, needed_empty: int) -> None:
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


def _shapes(tree: object, num_empty: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a state's arrays by path, stacks of layers without their empty ones."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
    return {p: (s[0] - num_empty, *s[1:]) if "layers" in p.split("/") else s for p, s in shapes.items()}
