"""The output of several processes in one: each line behind its process's number, equal lines once for all."""

import re
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TextIO

from realjax.core.processes import format_numbers

# A line waits so long for its equals of other processes.
HOLD_SECONDS = 0.4
CLOCK = re.compile(r"^\d{8}-\d\d:\d\d:\d\d\.\d{3} ")  # which equal lines have different ones of


@dataclass
class Held:
    """A line that waits for its equals, and the processes that have said it."""

    text: str
    since: float
    processes: set[int] = field(default_factory=set)


class MergedOutput:
    """Prints lines of `num_processes` processes, in the order of each; a context, which prints the rest at its end."""

    def __init__(self, num_processes: int, file: TextIO | None = None, hold_seconds: float = HOLD_SECONDS) -> None:
        self._num_processes, self._file = num_processes, file or sys.stdout
        self._hold_seconds = hold_seconds if num_processes > 1 else 0.0
        self._held: list[Held] = []
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._printer = threading.Thread(target=self._print_held, daemon=True)

    def write(self, process: int, line: str) -> None:
        """Takes a line of a process."""
        with self._lock:
            own = [i for i, held in enumerate(self._held) if process in held.processes]
            # Only what comes after its own last line: a process's lines keep their order.
            for held in self._held[own[-1] + 1 if own else 0 :]:
                if _without_clock(held.text) == _without_clock(line):
                    held.processes.add(process)
                    break
            else:
                self._held.append(Held(line.rstrip("\n"), time.monotonic(), {process}))
            self._flush()

    def _flush(self, *, everything: bool = False) -> None:
        now = time.monotonic()
        while self._held:
            first = self._held[0]
            is_due = len(first.processes) == self._num_processes or now - first.since >= self._hold_seconds
            if not (is_due or everything):
                return
            print(f"[{format_numbers(first.processes)}] {first.text}", file=self._file, flush=True)
            del self._held[0]

    def _print_held(self) -> None:
        while not self._is_over.wait(self._hold_seconds or 1.0):
            with self._lock:
                self._flush()

    def __enter__(self) -> "MergedOutput":
        self._printer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._printer.join()
        with self._lock:
            self._flush(everything=True)


def _without_clock(line: str) -> str:
    return CLOCK.sub("", line.rstrip("\n"))
