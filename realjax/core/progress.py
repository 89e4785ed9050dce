"""How far a process is in its run: a mark at each thing that it turns to, for a watchdog's thread to read."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

NUM_RECENT = 32
# Times the least bound: what compiles, or belongs to no step, such as loading; a call that was never made before.
LONGEST_START, LONGEST_FIRST = 12, 6


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The `number`-th thing that a process turned to: a call of a step, its results, a save."""

    number: int
    what: str
    step: int | None = None  # from 0

    def __str__(self) -> str:
        return self.what if self.step is None else f"{self.what} of step {self.step + 1}"


class Progress:
    """The marks of one process. Setting one takes a microsecond and waits for nobody.

    Every process of a run sets the same marks in the same order, so that their numbers can be compared.
    """

    def __init__(self) -> None:
        self.mark = Mark(number=0, what="start")
        self.recent: deque[Mark] = deque([self.mark], maxlen=NUM_RECENT)
        self.longest: dict[str, float] = {}  # seconds, by what was done, without those of compiling
        self.longest_compile = 0.0
        self.compiling: str | None = None
        self.num_compiles = 0  # begun or ended
        self.is_busy = False  # it computes on this machine as long as it goes on, and waits for no device
        self.pending_fn: Callable[[], Sequence[str]] = tuple  # names of calls whose results are not there yet
        self._since, self._compiled = time.monotonic(), 0.0

    def begin(self, what: str, step: int | None = None, *, is_busy: bool = False) -> None:
        """Says what the process does from now on; `is_busy`: of unknown length, but with work for the processor."""
        now = time.monotonic()
        if not self.is_busy:
            seconds = now - self._since - self._compiled
            self.longest[self.mark.what] = max(self.longest.get(self.mark.what, 0.0), seconds)
        self._since, self._compiled, self.is_busy = now, 0.0, is_busy
        self.mark = Mark(number=self.mark.number + 1, what=what, step=step)
        self.recent.append(self.mark)

    @contextmanager
    def compile(self, name: str) -> Iterator[None]:
        """While entered, the process compiles a program."""
        start = time.monotonic()
        self.compiling, self.num_compiles = name, self.num_compiles + 1
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.compiling, self.num_compiles = None, self.num_compiles + 1
            self.longest_compile, self._compiled = max(self.longest_compile, seconds), self._compiled + seconds

    def bound_seconds(self, least: float, compile_seconds: float | None = None) -> float:
        """Returns how long what is under way may take: ten times the longest of its kind so far, and at least `least`.

        What was never done before may take longer: six times `least`, and twelve times what belongs to no step, such as
        loading. A program may compile for `compile_seconds` (None: twelve times `least`), however quick others were:
        the next one may be a hundred times as large, and the last one may have come from the cache.
        """
        if self.compiling is not None:
            return max(compile_seconds or LONGEST_START * least, 10 * self.longest_compile)
        if self.mark.what in self.longest:
            return max(least, 10 * self.longest[self.mark.what])
        times = LONGEST_START if self.mark.step is None else LONGEST_FIRST
        return max(times * least, 10 * max(self.longest.values(), default=0.0))
