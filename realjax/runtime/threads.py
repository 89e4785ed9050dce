"""Calls in threads of their own, each with a time limit. One that hangs costs its own result and no other's."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Failed:
    """A call without a result, and why."""

    reason: str


class TimedCalls(Generic[T]):
    """Calls by the number of whoever waits for them; at most `num_threads` at once, the others wait their turn.

    Python ends no thread: one beyond its time goes on unheard, holds nothing up, and does not keep the process alive.
    """

    def __init__(self, num_threads: int, seconds: float) -> None:
        self.num_threads, self.seconds = num_threads, seconds
        self._waiting: deque[tuple[int, Callable[[], T]]] = deque()
        self._running: dict[int, tuple[int, float]] = {}  # by thread: whose it is, and when its time is over
        self._done: queue.SimpleQueue[tuple[int, T | Failed]] = queue.SimpleQueue()
        self._num_started = 0

    def __len__(self) -> int:
        """Calls whose results have not been taken."""
        return len(self._waiting) + len(self._running)

    def start(self, number: int, fn: Callable[[], T]) -> None:
        """Calls `fn` as soon as a thread is free."""
        self._waiting.append((number, fn))
        self._launch()

    def take(self, wait_seconds: float) -> list[tuple[int, T | Failed]]:
        """Returns what has ended, by its number; waits so long for the first at most, or for the end of its time."""
        now = time.monotonic()
        first_end = min((end for _, end in self._running.values()), default=now)
        found = self._drain(max(0.0, min(wait_seconds, first_end - now)))
        now = time.monotonic()
        for thread in [thread for thread, (_, end) in self._running.items() if end <= now]:
            number, _ = self._running.pop(thread)
            found.append((number, Failed(f"it took longer than {self.seconds:g} seconds")))
        self._launch()
        return found

    def _drain(self, wait_seconds: float) -> list[tuple[int, T | Failed]]:
        found: list[tuple[int, T | Failed]] = []
        try:
            while True:
                thread, result = self._done.get(timeout=0.0 if found else wait_seconds)
                if thread in self._running:  # else its time was over before
                    found.append((self._running.pop(thread)[0], result))
        except queue.Empty:
            return found

    def _launch(self) -> None:
        while self._waiting and len(self._running) < self.num_threads:
            number, fn = self._waiting.popleft()
            thread, self._num_started = self._num_started, self._num_started + 1
            self._running[thread] = (number, time.monotonic() + self.seconds)
            threading.Thread(target=self._call, args=(thread, fn), name=f"call {thread}", daemon=True).start()

    def _call(self, thread: int, fn: Callable[[], T]) -> None:
        try:
            result = fn()
        except (Exception, SystemExit) as error:
            self._done.put((thread, Failed(f"it raised {type(error).__name__}: {error}")))
        else:
            self._done.put((thread, result))
