"""When each call ran: measured without making the calls wait for each other."""

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

MOST_STEPS_DRAWN = 4


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


class Timeline:
    """Collects call records; a thread for each call under way waits for its results."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []
        self._began = time.perf_counter()
        self._threads: list[threading.Thread] = []

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began

    def watch(self, results: Any, *, start: float, **fields: Any) -> None:
        """Records the call that produces `results` when they are ready; returns at once."""

        def wait() -> None:
            jax.block_until_ready(results)
            self.records.append(CallRecord(start=start, end=self.now(), **fields))

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        self._threads.append(thread)

    def of_step(self, step: int) -> list[CallRecord]:
        """Returns the records of a step, all of whose calls have been made, in order of their start."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        return sorted((record for record in self.records if record.step == step), key=lambda record: record.start)

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
                "args": {"step": record.step, "tokens": record.num_tokens, "bytes_moved": record.bytes_moved},
            }
            for record in self.records
        ]
        path.write_text(json.dumps({"traceEvents": events}))

    def draw(self, path: Path) -> None:
        """Draws the calls of the last steps as bars, a row for each group of devices."""
        last = max((record.step for record in self.records), default=0)
        shown = [record for record in self.records if record.step > last - MOST_STEPS_DRAWN]
        groups = sorted({record.devices for record in shown})
        names = list(dict.fromkeys(record.name for record in shown))
        figure, axes = plt.subplots(figsize=(10, 1.5 + 0.6 * len(groups)))
        colors = plt.get_cmap("tab10")
        for record in shown:
            y, color = groups.index(record.devices), colors(names.index(record.name) % 10)
            axes.barh(y, record.end - record.start, left=record.start, color=color, edgecolor="white")
        axes.set_yticks(range(len(groups)), [f"devices {group}" for group in groups])
        axes.set_xlabel("seconds since the start of the run")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colors(i % 10)) for i in range(len(names))]
        axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=len(names), frameon=False)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)
