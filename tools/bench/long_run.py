"""What a long run costs the host: `python -m tools.bench.long_run [--steps N]`, with a stub in place of the programs.

SFT of the demo's model, whose training step returns at once. All else is a run's own: batches, placing them, metrics,
timeline, log, report. The processor's seconds a step and resident memory should not grow.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from realjax.allocation.allocate import allocate
from realjax.apps.demo_data import write_demo_files
from realjax.core.metrics import Mean
from realjax.dataflow.run import METRICS_FILE
from realjax.engine.compiled import CompileLog
from realjax.experiments import sft
from realjax.options.checks import resolve_names
from realjax.options.parsing import parse_overrides
from realjax.options.supervised import SFTConfig
from realjax.record.report import REPORT_FILE
from realjax.runtime import executor, loop

NUM_METRICS = 20
NUM_PARTS = 20  # of a run, each of which is measured


@dataclass(frozen=True, kw_only=True)
class Part:
    """Steps one after the other: the processor's seconds for each, and the process's memory at their end."""

    num_steps: int
    step_seconds: float
    resident_mib: float


class StubPrograms:
    """Stands for `Programs`: a training step that returns what it was given, and the same metrics each time."""

    def __init__(self, *_: object) -> None:
        self.log, self.device_bytes, self.times, self.resident = CompileLog(), 0, [], []
        self.metrics = {
            f"metric_{i}": Mean(*jax.device_put((np.float32(i), np.float32(1)))) for i in range(NUM_METRICS)
        }

    def train_step(self, *_: object) -> "StubPrograms":
        """Returns the stub."""
        return self

    def prepare(self, *_: object) -> None:
        """There is nothing to compile."""

    def __call__(self, state: Any, batch: object) -> tuple[Any, Any]:
        self.times.append(time.process_time())
        if len(self.times) % self.part_len == 0:
            self.resident.append(read_resident_mib())
        return state, self.metrics

    part_len = 1

    def parts(self) -> list[Part]:
        """Returns what was measured."""
        ends = self.times[:: self.part_len]
        return [
            Part(num_steps=self.part_len, step_seconds=(after - before) / self.part_len, resident_mib=resident)
            for before, after, resident in zip(ends, ends[1:], self.resident[1:], strict=False)
        ]


def read_resident_mib() -> float:
    """Returns the memory of this process that is in use, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def take_steps(folder: Path, num_steps: int) -> tuple[list[Part], Path]:
    """Returns the parts of a run of so many steps, and its log directory."""
    files = write_demo_files(folder, num_train=64, num_valid=8)
    words = (
        *("experiment_name=long", "trial_name=run", f"fileroot={folder}", "mode=local", "allocation_mode=d1p1m1"),
        *(f"model.path={files.model}", "model.init_from_scratch=True", "n_gpus_per_node=1"),
        *(f"dataset.train_path={files.data / 'sft-train.jsonl'}", "dataset.max_seqlen=64"),
        *("dataset.train_bs_n_seqs=4", f"total_train_epochs={num_steps // 16 + 1}", f"benchmark_steps={num_steps}"),
    )
    spec = sft.build(resolve_names(parse_overrides(SFTConfig, words), "sft"))
    made: list[StubPrograms] = []

    def make(*given: object) -> StubPrograms:
        made.append(StubPrograms(*given))
        made[0].part_len = num_steps // NUM_PARTS
        return made[0]

    with mock.patch.object(executor, "Programs", make):
        loop.run(spec, allocate(spec, jax.devices()[:1]))
    return made[0].parts(), spec.paths.logs


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of the parts, and the sizes of what the run leaves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        parts, logs = take_steps(Path(folder), args.steps)
        for part in parts:
            print(f"{part.num_steps} steps: {1e3 * part.step_seconds:.2f} ms a step, {part.resident_mib:.0f} MiB")
        print(f"{time.perf_counter() - start:.0f} s in all")
        for name in (METRICS_FILE, "trace.json", "timeline.png", REPORT_FILE, "run.log"):
            print(f"{name}: {(logs / name).stat().st_size / 2**20:.2f} MiB")
        events = sum(path.stat().st_size for path in (logs / "tensorboard").iterdir())
        print(f"tensorboard: {events / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
