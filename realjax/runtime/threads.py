"""Calls in threads of their own, each with a time limit. One that hangs costs its own result and no other's."""

import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import jax

from realjax.core.processes import Mailbox

T = TypeVar("T")
Span = tuple[float, float]  # from when to when, in seconds
SHORT_PAUSE = 0.05  # seconds; what lies closer together is one span


@dataclass(frozen=True)
class Failed:
    """A call without a result, and why."""

    reason: str


class TimedCalls(Generic[T]):
    """Calls by the key of whoever waits for them; at most `num_threads` at once, the others wait their turn.

    Python ends no thread: one beyond its time goes on unheard, holds nothing up, and does not keep the process alive.
    """

    def __init__(self, num_threads: int, seconds: float, now_fn: Callable[[], float] = time.monotonic) -> None:
        self.num_threads, self.seconds, self._now_fn = num_threads, seconds, now_fn
        self._busy_since: float | None = None
        self._last_end = 0.0
        self._spans: list[Span] = []  # in which calls were under way
        self._waiting: deque[tuple[Hashable, Callable[[], T]]] = deque()
        self._running: dict[int, tuple[Hashable, float]] = {}  # by thread: whose it is, and when its time is over
        self._done: queue.SimpleQueue[tuple[int, T | Failed, float]] = queue.SimpleQueue()  # the last: when it ended
        self._num_started = 0

    def __len__(self) -> int:
        """Calls whose results have not been taken."""
        return len(self._waiting) + len(self._running)

    def start(self, key: Hashable, fn: Callable[[], T]) -> None:
        """Calls `fn` as soon as a thread is free."""
        self._waiting.append((key, fn))
        self._launch()

    def take(self, wait_seconds: float) -> list[tuple[Hashable, T | Failed]]:
        """Returns what has ended, by its key; waits so long for the first at most, or for the end of its time."""
        now = time.monotonic()
        first_end = min((end for _, end in self._running.values()), default=now)
        found = self._drain(max(0.0, min(wait_seconds, first_end - now)))
        now = time.monotonic()
        for thread in [thread for thread, (_, end) in self._running.items() if end <= now]:
            key, _ = self._running.pop(thread)
            found.append((key, Failed(f"it took longer than {self.seconds:g} seconds")))
            self._last_end = self._now_fn()
        if not self._running and self._busy_since is not None:
            self._add_span(self._busy_since, self._last_end)
            self._busy_since = None
        self._launch()
        return found

    def take_spans(self) -> list[Span]:
        """Returns from when to when calls were under way, as far as they have been taken since the last time."""
        spans, self._spans = self._spans, []
        return spans

    def _add_span(self, start: float, end: float) -> None:
        if self._spans and start - self._spans[-1][1] < SHORT_PAUSE:
            start, _ = self._spans.pop()
        self._spans.append((start, end))

    def _drain(self, wait_seconds: float) -> list[tuple[Hashable, T | Failed]]:
        found: list[tuple[Hashable, T | Failed]] = []
        try:
            while True:
                thread, result, end = self._done.get(timeout=0.0 if found else wait_seconds)
                if thread in self._running:  # else its time was over before
                    found.append((self._running.pop(thread)[0], result))
                    self._last_end = end
        except queue.Empty:
            return found

    def _launch(self) -> None:
        if self._waiting and not self._running:
            self._busy_since = self._now_fn()
        while self._waiting and len(self._running) < self.num_threads:
            key, fn = self._waiting.popleft()
            thread, self._num_started = self._num_started, self._num_started + 1
            self._running[thread] = (key, time.monotonic() + self.seconds)
            threading.Thread(target=self._call, args=(thread, fn), name=f"call {thread}", daemon=True).start()

    def _call(self, thread: int, fn: Callable[[], T]) -> None:
        try:
            result = fn()
        except (Exception, SystemExit) as error:
            self._done.put((thread, Failed(f"it raised {type(error).__name__}: {error}"), self._now_fn()))
        else:
            self._done.put((thread, result, self._now_fn()))


class SharedCalls(Generic[T]):
    """Timed calls of one process, of whose results several hear the same in the same order."""

    def __init__(self, own: TimedCalls[T], mailbox: Mailbox | None = None, source: int = 0) -> None:
        """`own` are this process's. Without a mailbox they are heard here alone; else those of the process `source`."""
        self._own = own
        self._spans: list[Span] = []
        self._mailbox, self._source, self._num_open = mailbox, source, 0

    def start(self, key: Hashable, fn: Callable[[], T]) -> None:
        """Has the process whose calls they are call `fn` as soon as a thread is free."""
        self._num_open += 1
        if self._is_caller:
            self._own.start(key, fn)

    def take(self, wait_seconds: float | None) -> list[tuple[Hashable, T | Failed]]:
        """Returns what has ended, by its key; waits so long at most, None: until a call has ended.

        Where several processes hear, each of them must call this.
        """
        if not self._num_open:
            return []
        found = self._take_own(wait_seconds) if self._is_caller else []
        spans = self._own.take_spans()
        if self._mailbox is not None:
            message = pickle.dumps((found, spans)) if self._is_caller else None
            found, spans = pickle.loads(self._mailbox.send(message, self._source))
        self._num_open -= len(found)
        self._spans += spans
        return found

    def take_spans(self) -> list[Span]:
        """As of `TimedCalls`, of all that was taken: the same wherever it is heard."""
        spans, self._spans = self._spans, []
        return spans

    def end_round(self) -> None:
        """Says that all processes have taken what was taken before they began what is under way."""
        if self._mailbox is not None:
            self._mailbox.end_round()

    @property
    def _is_caller(self) -> bool:
        return self._mailbox is None or jax.process_index() == self._source

    def _take_own(self, wait_seconds: float | None) -> list[tuple[Hashable, T | Failed]]:
        found = self._own.take(60.0 if wait_seconds is None else wait_seconds)
        while not found and wait_seconds is None:
            found = self._own.take(60.0)
        return found
