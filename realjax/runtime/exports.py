"""The HuggingFace checkpoints that a run leaves, written beside its steps: those of its saves, and the best one by a
metric.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from realjax.core.host_memory import available_bytes
from realjax.core.processes import is_first
from realjax.core.trees import Tree
from realjax.data.loader import Position
from realjax.dataflow.run import RunSpec
from realjax.hf.adapters import begin_save_adapters
from realjax.hf.save import Target, begin_save, find_writer
from realjax.runtime.background import BackgroundWrites
from realjax.runtime.roles import Role

logger = logging.getLogger("realjax.exports")
# Of the memory that the host has left, for copies of models that are being written.
COPIES_SHARE = 0.5
Best = dict[str, float | str]  # `value` of the metric, and the `directory` below the role's that has the parameters


class Exports:
    """Writes checkpoints, and keeps the best one until the state that names a better one is on the disk."""

    def __init__(self, spec: RunSpec, roles: Mapping[str, Role], best: Best | None) -> None:
        """`best` is what the state says that the run continues from."""
        self.root, self.roles, self.max_shard_bytes = spec.paths.checkpoints, roles, spec.max_shard_bytes
        self.writes = BackgroundWrites()
        self.best, self.best_role = best, next((one.role for one in spec.evaluations.values()), "")
        if best is not None and not (self.root / self.best_role / str(best["directory"])).is_dir():
            logger.warning("the best checkpoint so far, %s, is gone: the next evaluation's is the best", best)
            self.best = None
        self._held = {str(self.best["directory"])} if self.best else set()  # that states on the disk name
        if is_first():
            for leftover in self.root.glob("*/.*"):  # of a process that was killed
                shutil.rmtree(leftover)
        self._drop_others()

    def __enter__(self) -> "Exports":
        return self

    def __exit__(self, *exception: object) -> None:
        self.writes.close()

    def write(self, name: str, params: Tree, directory: str) -> None:
        """Has a role's parameters written, with adapters these alone, also over those of a step that is taken again
        after a restart.

        When it returns they are off the devices. Where the host has no memory for them, they are on the disk.
        """
        out_dir, role = self.root / name / directory, self.roles[name]
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        writer = find_writer(params)
        if role.model.config.lora is not None:
            trained = role.model.take_trained(params)
            write_adapters_fn = begin_save_adapters(trained, role.model.config, out_dir, base=role.spec.path)
            self.writes.begin(lambda: _finish(write_adapters_fn, f"the adapters of {name}", out_dir), writer)
            return
        target = Target(
            config=role.model.config,
            source_dir=role.spec.path,
            # A model from scratch has no weights to take the precision from: its masters are kept as they are.
            dtype="float32" if role.spec.init_from_scratch else "source",
            max_shard_bytes=self.max_shard_bytes,
            ends=role.spec.ends,
        )
        write_fn = begin_save(params, target, out_dir, most_bytes=COPIES_SHARE * available_bytes())
        self.writes.begin(lambda: _finish(write_fn, name, out_dir), writer)

    def keep_best(self, params: Tree, value: float, step: int) -> None:
        """Has the parameters after `step` written when their value is better than the best before."""
        if self.best is None or value > float(self.best["value"]):
            directory = f"best-globalstep{step}"
            self.writes.wait()
            self._drop_others()
            self.write(self.best_role, params, directory)
            self.best = {"value": value, "directory": directory}

    def hold_best(self) -> Callable[[], None]:
        """Keeps the best checkpoint of now for a state that names it; returns what to call once that is on the disk.

        Until then the best one that the state before names stays too.
        """
        named = {str(self.best["directory"])} if self.best else set()
        self._held |= named

        def let_go() -> None:
            self._held = named
            self._drop_others()

        return let_go

    def _drop_others(self) -> None:
        kept = self._held | ({str(self.best["directory"])} if self.best else set())
        for path in (self.root / self.best_role).glob("best-*") if is_first() else ():
            if path.name not in kept:
                hidden = path.with_name(f".{path.name}.replaced")  # nobody should find a half of it
                os.replace(path, hidden)
                shutil.rmtree(hidden)


def _finish(write_fn: Callable[[], None], name: str, out_dir: Path) -> None:
    write_fn()
    logger.info("saved %s to %s", name, out_dir)


def checkpoint_name(position: Position) -> str:
    """Returns ReaL's directory name of a checkpoint."""
    return f"epoch{position.epoch}epochstep{position.epoch_step}globalstep{position.global_step}"
