"""Metrics of a run on disk: `metrics.jsonl` (the record), TensorBoard events and, when asked for, Weights & Biases."""

import importlib
import json
import math
import numbers
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, SupportsFloat

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from realjax.core.faults import naming, removed
from realjax.core.json_text import JsonObject, parse_json
from realjax.dataflow.run import METRICS_FILE
from realjax.record.spread import Spread

WANDB_MODES = ("disabled", "offline", "online")
FLUSH_SECONDS = 10
PROTO: Any = event_pb2  # whose classes are made at run time
RECORD_KEYS = ("step", "kind", "time", "nonfinite")

Metric = float | int | str


class MetricsWriter:
    """Appends the metrics of one run; made by one process only, before device work, since it checks its options.

    `resume_step=s > 0` continues a run whose step s was saved: records of later steps are removed. `resume_step=0`
    starts anew and keeps an earlier file as `metrics.<n>.jsonl`. ValueError: unknown `wandb_mode`, wandb not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        wandb_mode: str = "disabled",
        wandb_project: str = "realjax",
        resume_step: int = 0,
    ) -> None:
        run_dir = Path(run_dir)
        wandb = import_wandb(wandb_mode)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        if path.exists():
            drop_later_steps(path, resume_step) if resume_step > 0 else set_aside(path)
        self._path, self._wandb_run = path, None
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoardFile(run_dir / "tensorboard", resume_step)
        if wandb is not None:
            self._wandb_run = start_wandb(wandb, run_dir, wandb_mode, wandb_project, resume_step)

    def write(self, step: int, metrics: Mapping[str, Metric], kind: str = "train") -> None:
        """Appends one flushed line: step, kind, time, metrics; non-finite numbers are null, named in `nonfinite`."""
        reserved = [name for name in metrics if name in RECORD_KEYS]
        if reserved:
            raise ValueError(f"metrics: names {reserved} are taken by the record itself {RECORD_KEYS}; rename them")
        values = {name: plain_value(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if isinstance(value, str) or math.isfinite(value)}
        record: JsonObject = {"step": int(step), "kind": kind, "time": time.time()}
        record |= {name: finite.get(name) for name in values}
        if len(finite) < len(values):
            record["nonfinite"] = [name for name in values if name not in finite]
        with naming(self._path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise removed(self._path)
        self._tensorboard.write(
            step, {f"{kind}/{name}": value for name, value in finite.items() if not isinstance(value, str)}
        )
        if self._wandb_run is not None:
            self._wandb_run.log({"step": int(step)} | {f"{kind}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Flushes and closes every output, also where one fails; a second call does nothing."""
        with ExitStack() as ends:
            if self._wandb_run is not None:
                ends.callback(self._wandb_run.finish)
                self._wandb_run = None
            ends.callback(self._tensorboard.close)
            ends.enter_context(naming(self._path))
            ends.callback(self._file.close)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TensorBoardFile:
    """Scalars as one file of TensorBoard events; written as they come, for the library's own thread dies of a full
    disk without a word, and the run waits for it forever."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        directory.mkdir(exist_ok=True)
        self._directory, self._flushed = directory, time.monotonic()
        # File names carry whole seconds: without the suffix a quick restart would overwrite the earlier events.
        suffix = f".{os.getpid()}.from_step_{resume_step}"
        with naming(directory):
            self._events = EventsWriter(str(directory / "events"), suffix)
            # TensorBoard hides what an interrupted run wrote from this step on.
            start = PROTO.SessionLog(status=PROTO.SessionLog.START)
            first = resume_step + 1 if resume_step > 0 else 0
            self._events.write_event(PROTO.Event(wall_time=time.time(), step=first, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step, which a reader sees within ten seconds of the next ones."""
        with naming(self._directory):
            summary = PROTO.Event(wall_time=time.time(), step=int(step))
            for name, value in values.items():
                summary.summary.value.extend(scalar(name, value).value)
            self._events.write_event(summary)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with naming(self._directory):
            self._events.close()


def read_metrics(path: str | Path) -> list[JsonObject]:
    """Records of a metrics file in written order, see `iterate_metrics`."""
    return list(iterate_metrics(path))


def iterate_metrics(path: str | Path) -> Iterator[JsonObject]:
    """Yields the records of a metrics file, one in memory; a torn last line (killed while writing) is left out.

    ValueError names the line of any other unreadable record.
    """
    fault: ValueError | None = None
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if fault is not None:
                raise ValueError(
                    f"metrics: '{path}' line {number - 1}: {fault}; only a last line may be torn, "
                    "so remove that line or restore the file"
                ) from fault
            try:
                record = _record(line)
            except ValueError as error:
                fault = error
            else:
                yield record


def read_spread(path: str | Path) -> list[JsonObject]:
    """Returns records of a metrics file as `read_metrics` does, of a long run some: of each kind a few thousand, evenly
    spread, and the last.
    """
    by_kind: dict[str, Spread[tuple[int, JsonObject]]] = {}
    last: dict[str, tuple[int, JsonObject]] = {}
    for number, record in enumerate(iterate_metrics(path)):
        last[record["kind"]] = number, record
        by_kind.setdefault(record["kind"], Spread()).add((number, record))
    found = dict(last.values()) | {number: record for spread in by_kind.values() for number, record in spread.values}
    return [found[number] for number in sorted(found)]


def _record(line: bytes) -> JsonObject:
    record = parse_json(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("no JSON object with a step")
    return record


def drop_later_steps(path: str | Path, step: int) -> None:
    """Rewrites a metrics file without a torn last line and without records after `step`."""
    replace_lines(path, (json.dumps(record) for record in iterate_metrics(path) if record["step"] <= step))


def set_aside(path: Path) -> Path:
    """Renames `name.ext` to the first free `name.<n>.ext`, and returns that path."""
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(target)


def replace_text(path: str | Path, text: str) -> None:
    """Writes a text file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    _replace(path, (text,))


def replace_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Does the same with lines, which come without their ends, one in memory."""
    _replace(path, (f"{line}\n" for line in lines))


def _replace(path: str | Path, parts: Iterable[str]) -> None:
    temporary = Path(f"{path}.tmp")
    with naming(path), temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def plain_value(value: SupportsFloat | str) -> Metric:
    """A Python str, int or float from those or from a scalar of NumPy or JAX."""
    if isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def import_wandb(mode: str) -> Any:
    """The wandb module, or None when `mode` is disabled. ValueError: unknown mode, or wandb not installed."""
    if mode not in WANDB_MODES:
        raise ValueError(f"wandb_mode: '{mode}' is not a mode; use one of {', '.join(WANDB_MODES)}")
    if mode == "disabled":
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"wandb_mode: '{mode}' needs the package wandb, which does not import here ({error}); "
            "install the extra with `pip install 'realjax[wandb]'` or set wandb_mode=disabled"
        ) from error


def start_wandb(wandb: Any, run_dir: Path, mode: str, project: str, resume_step: int) -> Any:
    """A wandb run; a resumed run continues under the id that its start left in `wandb_id`."""
    id_path = run_dir / "wandb_id"
    if resume_step == 0 or not id_path.exists():
        replace_text(id_path, uuid.uuid4().hex[:12])
    run_id = id_path.read_text(encoding="utf-8")
    names = {"project": project, "group": run_dir.parent.name, "name": run_dir.name}
    run = wandb.init(**names, dir=str(run_dir), mode=mode, id=run_id, resume="allow")
    # wandb's own counter refuses to go back, which a resume does: our step is the x axis instead.
    run.define_metric("*", step_metric="step")
    return run
