"""Commands: a run of any experiment in this process or in one of its own, and what it left."""

import getpass
import json
import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from safetensors.numpy import load_file

from realjax.apps import quickstart
from realjax.record.metrics import read_metrics
from realjax.runtime.executor import StepResult
from realjax.runtime.session import Session
from realjax.runtime.stop import StopSignal
from tests.given.processes import start_process
from tests.given.runs import GROUPS, Given, make_options, make_rl_options


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A small run: its experiment, models and data, its fileroot, its name, and its options."""

    given: Given
    root: Path
    name: str = "trial"
    experiment: str = "sft"
    options: Mapping[str, Any] = field(default_factory=dict)

    def words(self, **changes: Any) -> list[str]:
        """Returns the command line after the experiment; `__` in a change's name stands for a dot."""
        changes = {"trial_name": self.name, **self.options, **changes}
        if self.experiment in GROUPS:
            options = make_rl_options(self.given, self.root, self.experiment, **changes)
        else:
            learned = {"dataset.train_path": self.given.train, "dataset.max_seqlen": 32}
            own = {
                "sft": {"model.optimizer.lr": 0.01, **learned},
                "dpo": {"actor.optimizer.lr": 0.01, "dataset.max_seqlen": 32},
            }
            changes = {name.replace("__", "."): value for name, value in changes.items()}
            options = make_options(self.experiment, self.given, self.root, **own.get(self.experiment, {}) | changes)
        return [f"{name}={value}" for name, value in options.items()]

    def run(self, **changes: Any) -> int:
        """Runs the command in this process and returns its exit code."""
        with kept_log_settings():
            return quickstart.main([self.experiment, *self.words(**changes)])

    def start(self, **changes: Any) -> subprocess.Popen:
        """Starts the command in a process of its own, its output in `<root>/<name>.log`."""
        command = ["-m", "realjax.apps.quickstart", self.experiment, *self.words(**changes)]
        return start_process(command, self.root / f"{self.name}.log")

    def folder(self, kind: str) -> Path:
        """Returns the trial's directory of `logs`, `checkpoints` or `recover`."""
        return self.root / kind / getpass.getuser() / "e2e" / self.name

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Returns the records of a kind, or all."""
        records = read_metrics(self.folder("logs") / "metrics.jsonl")
        return [record for record in records if kind in (None, record["kind"])]

    def steps(self) -> list[int]:
        return [record["step"] for record in self.metrics("train")]

    def answers(self, name: str = "output.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder("logs") / name).read_text().splitlines()]

    def weights(self, step: int, role: str = "default") -> dict[str, np.ndarray]:
        """Returns the tensors of a role's HuggingFace checkpoint after `step` steps."""
        (directory,) = self.folder("checkpoints").glob(f"{role}/epoch*globalstep{step}")
        return load_file(directory / "model.safetensors")

    def state(self, step: int, role: str = "default") -> dict[str, np.ndarray]:
        """Returns every array of a role's state saved after `step` steps: parameters, moments, counters."""
        directory = epath.Path(self.folder("recover") / str(step) / f"role_{role}")
        # On one device: the save knows those of the run, which may have had other processes.
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saved = ocp.StandardCheckpointHandler().metadata(directory).tree
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved)
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(directory, target)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@contextmanager
def kept_log_settings() -> Iterator[None]:
    """Gives the logger back as it was: other tests read records where the command line sends none."""
    root = logging.getLogger("realjax")
    kept = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.propagate = kept[0], kept[2]
    root.setLevel(kept[1])


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """While entered, a run of this process gets SIGTERM in this step: it saves, and ends with the code 143."""
    finish_step = Session.finish_step

    def stop_and_finish(session: Session, index: int, result: StepResult, stop: StopSignal):
        if index + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish_step(session, index, result, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "finish_step", stop_and_finish)
        yield
