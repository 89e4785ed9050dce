"""When each call ran: measured without making the calls wait for each other."""

import heapq
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from realjax.core.metrics import Mean
from realjax.core.processes import from_first, gather

MOST_STEPS_DRAWN = 4
# Steps that a timeline keeps of a long run: how it began, what took longest, and how it goes now.
NUM_FIRST, NUM_SLOWEST, NUM_LAST = 50, 50, 200
HOST = "host"  # instead of devices: a call that runs on none


@dataclass(frozen=True, kw_only=True)
class CallRecord:
    """One call: its devices, its seconds since the run began, and what it moved and computed."""

    step: int
    name: str
    devices: str
    start: float
    end: float
    num_tokens: int
    num_flops: float
    bytes_moved: int
    peak_bytes: int = 0  # on the fullest of its devices while it ran, see `runtime/memory.py`
    per_round: Mean = Mean(0, 0)  # tokens that a row has drawn in a round, where they may be several
    after: tuple[str, ...] = ()  # calls of the step that it has to wait for
    process: int | None = None  # the one whose times count, since only it has results to wait for; None: any


def measure_calls(records: Iterable[CallRecord]) -> dict[str, float]:
    """Returns seconds, rates, memory and moved bytes (MiB of 2^20 bytes) of each call, as `time/<call>` and so on.

    Of a call that ran several times they are those of all times together. Tokens a round are those of calls whose rows
    may draw several.
    """
    by_name: dict[str, list[CallRecord]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    values = {}
    for name, runs in by_name.items():
        seconds = max(sum(run.end - run.start for run in runs), 1e-9)
        values[f"time/{name}"] = seconds
        if runs[0].devices == HOST:
            continue
        values |= {
            f"tokens_per_second/{name}": sum(run.num_tokens for run in runs) / seconds,
            f"tflops/{name}": sum(run.num_flops for run in runs) / seconds / 1e12,
            f"memory_mib/{name}": max(run.peak_bytes for run in runs) / 2**20,
            f"moved_mib/{name}": sum(run.bytes_moved for run in runs) / 2**20,
        }
        per_round = reduce(Mean.merged, (run.per_round for run in runs))
        if per_round.weight:
            values[f"tokens_per_round/{name}"] = per_round.value
    return values


class History:
    """Records of a run's steps: of the first, the last and, between these, those that took longest."""

    def __init__(self) -> None:
        self._first: list[tuple[CallRecord, ...]] = []
        self._last: deque[tuple[CallRecord, ...]] = deque()
        self._slowest: list[tuple[float, int, tuple[CallRecord, ...]]] = []  # a heap: seconds, number, records
        self._num_steps = 0

    def add(self, records: Sequence[CallRecord]) -> None:
        """Takes in the records of the step that follows."""
        if not records:
            return
        self._num_steps += 1
        if len(self._first) < NUM_FIRST:
            self._first.append(tuple(records))
            return
        self._last.append(tuple(records))
        if len(self._last) > NUM_LAST:
            oldest = self._last.popleft()
            seconds = max(record.end for record in oldest) - min(record.start for record in oldest)
            heapq.heappush(self._slowest, (seconds, self._num_steps, oldest))
            if len(self._slowest) > NUM_SLOWEST:
                heapq.heappop(self._slowest)

    def __iter__(self) -> Iterator[CallRecord]:
        """Yields what is kept, step by step in order."""
        between = [records for _, _, records in sorted(self._slowest, key=lambda one: one[1])]
        return chain.from_iterable((*self._first, *between, *self._last))


class Timeline:
    """Collects call records; a thread for each call under way waits for its results."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []  # of steps that nobody has asked for
        self.history = History()
        from_first(0)  # the clocks of several processes start together
        self._began = time.perf_counter()
        self._threads: list[tuple[int, threading.Thread]] = []  # by step
        self._ends: dict[str, float] = {}  # of the calls of the last step that was asked for, by name
        self._error: jax.errors.JaxRuntimeError | None = None

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began

    def watch(self, results: object, *, start: float, **fields: Any) -> None:
        """Records the call that produces `results` when they are ready; returns at once."""
        owners = {device.process_index for leaf in jax.tree.leaves(results) for device in leaf.sharding.device_set}
        if not owners:  # nothing to wait for: the call has waited itself
            self.records.append(CallRecord(start=start, end=self.now(), **fields))
            return
        process = min(owners) if len(owners) < jax.process_count() else None

        def wait() -> None:
            try:
                jax.block_until_ready(results)
            except jax.errors.JaxRuntimeError as error:
                self._error = error  # for whoever asks for the records
                return
            self.records.append(CallRecord(start=start, end=self.now(), process=process, **fields))

        thread = threading.Thread(target=wait, daemon=True, name=str(fields.get("name")))
        thread.start()
        self._threads.append((fields["step"], thread))

    def add_host_call(self, name: str, step: int, start: float, end: float) -> None:
        """Records a call of the host, whose times are the same in every process."""
        none = {"num_tokens": 0, "num_flops": 0.0, "bytes_moved": 0}
        self.records.append(CallRecord(step=step, name=name, devices=HOST, start=start, end=end, **none))

    def list_pending(self) -> tuple[str, ...]:
        """Returns the names of the calls whose results are not there yet."""
        return tuple(thread.name for _, thread in tuple(self._threads) if thread.is_alive())

    def of_step(self, step: int) -> list[CallRecord]:
        """Returns the records of a step, all of whose calls have been made, in order of their start.

        Calls are made ahead of time: one begins when those that it waits for have ended, its own of the step before
        among them, and not when it was made. Every process must call this: each learns what another one measured.
        """
        for thread in [thread for number, thread in self._threads if number <= step]:
            thread.join()
        self._threads = [one for one in self._threads if one[0] > step]
        if self._error is not None:
            raise self._error
        records = sorted((record for record in self.records if record.step == step), key=lambda record: record.name)
        if any(record.process is not None for record in records):
            times = gather(np.array([[record.start, record.end] for record in records]))
            for i, record in enumerate(records):
                start, end = times[record.process or 0, i]
                records[i] = replace(record, start=float(start), end=float(end))
        ends = {record.name: record.end for record in records}
        for i, record in enumerate(records):
            before = self._ends.get(record.name, 0.0)
            start = max([record.start, before, *(ends[name] for name in record.after)])
            records[i] = replace(record, start=min(start, record.end))
        self._ends = ends
        self.records = [record for record in self.records if record.step != step]
        records.sort(key=lambda record: record.start)
        self.history.add(records)
        return records

    def list_records(self) -> list[CallRecord]:
        """Returns the records that are kept: of a long run those of some steps, see `History`."""
        return [*self.history, *self.records]

    def write_trace(self, path: Path) -> None:
        """Writes a Chrome/Perfetto trace: a row for each group of devices."""
        events = [
            {
                "name": record.name,
                "ph": "X",
                "ts": record.start * 1e6,
                "dur": (record.end - record.start) * 1e6,
                "pid": 0,
                "tid": record.devices,
                "args": {
                    "step": record.step,
                    "tokens": record.num_tokens,
                    "bytes_moved": record.bytes_moved,
                    "peak_bytes": record.peak_bytes,
                },
            }
            for record in self.list_records()
        ]
        path.write_text(json.dumps({"traceEvents": events}))

    def draw(self, path: Path) -> None:
        """Draws the calls of the last steps as bars, a row for each group of devices."""
        records = self.list_records()
        last = max((record.step for record in records), default=0)
        shown = [record for record in records if record.step > last - MOST_STEPS_DRAWN]
        title = lambda devices: devices if devices == HOST else f"devices {devices}"
        bars = [Bar(record.name, title(record.devices), record.start, record.end) for record in shown]
        draw_bars(path, bars, label="seconds since the start of the run")


@dataclass(frozen=True)
class Bar:
    """Something that took time, in seconds."""

    name: str
    row: str
    start: float
    end: float


def draw_bars(path: Path, bars: Sequence[Bar], *, label: str) -> None:
    """Draws a timeline: a row for each group of devices, a colour for each name."""
    # Imported here: it takes a second, which nobody should wait for before the first step.
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, names = sorted({bar.row for bar in bars}), list(dict.fromkeys(bar.name for bar in bars))
    figure = Figure(figsize=(10, 1.5 + 0.6 * len(rows)))
    axes, colors = figure.subplots(), colormaps["tab10"]
    for bar in bars:
        color = colors(names.index(bar.name) % 10)
        axes.barh(rows.index(bar.row), bar.end - bar.start, left=bar.start, color=color, edgecolor="white")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(label)
    handles = [Patch(color=colors(i % 10)) for i in range(len(names))]
    axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=len(names), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
