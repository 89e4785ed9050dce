"""A run whose processes make no progress, or are in different calls, ends: with their stacks and a line that says who
waits for whom.

Each process has a thread that writes where it is to a file beside the log directory, and looks at the others' there.
What counts is the number of this thread's own turns, so a machine that was suspended has missed nothing.
"""

import faulthandler
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import jax

from realjax.core.exit_codes import STALLED
from realjax.core.processes import format_numbers, from_first, is_first
from realjax.core.progress import LONGEST_START, Mark, Progress
from realjax.runtime.lock import lock_run

logger = logging.getLogger("realjax.watchdog")
TURN_SECONDS = 2.0
FOLDER, STACKS, VERDICT = "processes", "stacks", "verdict.json"
SPY_SECONDS = 20
BUSY_SHARE = 0.05  # of a processor, from which on a process that reads data is at work
# The others leave it to the first process to speak, unless it does not.
PATIENCE_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a process is, as it says in its file."""

    turn: int  # of its watchdog
    recent: tuple[Mark, ...]
    seconds: float = 0.0  # since it turned to the last of them
    bound: float = 0.0  # seconds that this may take
    is_busy: bool = False  # see `Progress`
    compiling: str | None = None
    pending: tuple[str, ...] = ()  # calls whose results its devices have not yet made

    @property
    def mark(self) -> Mark:
        return self.recent[-1]

    def __str__(self) -> str:
        more = [f"compiling {self.compiling}"] if self.compiling else []
        more += [f"waiting for {', '.join(self.pending)} on the devices"] if self.pending else []
        return f"{self.mark} ({', '.join([f'for {self.seconds:.0f} s', *more])})"


class Watchdog:
    """While entered, a thread ends the process when its run makes no progress. Every process of a run enters it."""

    def __init__(
        self,
        logs: Path,
        least_seconds: float | None,
        compile_seconds: float | None = None,
        turn_seconds: float = TURN_SECONDS,
    ) -> None:
        """`least_seconds`: no bound is shorter; None: nobody watches. `logs` is the log directory.

        `compile_seconds`: how long a program may compile, see `Progress.bound_seconds`.
        """
        self.progress = Progress()
        # Beside the logs, which a run that starts anew sets aside.
        self.folder, self.stacks = logs.with_name(f".{logs.name}.{FOLDER}"), logs / STACKS
        self.least_seconds, self.compile_seconds, self.turn_seconds = least_seconds, compile_seconds, turn_seconds
        self.process_id, self.num_processes = jax.process_index(), jax.process_count()
        self._is_over = threading.Event()
        self._turn = self._idle_turns = 0
        self._seen, self._processor_seconds = (-1, -1), 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")

    def __enter__(self) -> Progress:
        if self.least_seconds is None:
            return self.progress
        if is_first():
            if self.folder.exists():  # of an earlier start
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        from_first(0)  # nobody writes before that
        self._thread.start()
        return self.progress

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        if self.least_seconds is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            if is_first():
                shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        while not self._is_over.wait(self.turn_seconds):
            self._take_turn()

    def _take_turn(self) -> None:
        self._turn += 1
        seen = (self.progress.mark.number, self.progress.num_compiles)
        self._idle_turns = self._idle_turns + 1 if seen == self._seen and not self._is_at_work() else 0
        self._seen = seen
        bound = self._bound_seconds()
        self._arm(bound)
        # A disk that is full for a while is no reason to end here.
        with suppress(OSError):
            self._write(f"{self.process_id}.json", json.dumps(asdict(self.position())))
        if (self.folder / VERDICT).exists():
            self._dump_stacks()
            # Without the first process JAX ends the others, the one that speaks among them.
            time.sleep(is_first() * PATIENCE_TURNS * self.turn_seconds)
            self._leave()
        elif is_first() and (line := describe_difference(self._read_positions())) is not None:
            self._announce(line)
        elif self._idle_seconds() > bound and not is_at_work(self.progress.mark, self._read_others()):
            self._announce(f"no progress for {bound:.0f} s: {self._describe_stall()}")

    def _is_at_work(self) -> bool:
        """Whether what may take any time, as it goes by the data, took some of a processor since the last turn."""
        before, self._processor_seconds = self._processor_seconds, time.process_time()
        return self.progress.is_busy and self._processor_seconds - before > BUSY_SHARE * self.turn_seconds

    def _idle_seconds(self) -> float:
        return (self._idle_turns - PATIENCE_TURNS * (not is_first())) * self.turn_seconds

    def _bound_seconds(self) -> float:
        assert self.least_seconds is not None
        return self.progress.bound_seconds(self.least_seconds, self.compile_seconds)

    def position(self) -> Position:
        """Returns where this process is."""
        progress = self.progress
        return Position(
            turn=self._turn,
            recent=tuple(progress.recent),
            seconds=self._idle_turns * self.turn_seconds,
            bound=self._bound_seconds(),
            is_busy=progress.is_busy,
            compiling=progress.compiling,
            pending=tuple(progress.pending_fn()),
        )

    def _arm(self, bound: float) -> None:
        """Has the stacks written, and of several processes this one ended, also where Python's lock is never released.

        A process that runs alone may have been stopped by its user for a while.
        """
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(bound + 60, exit=self.num_processes > 1, file=sys.__stderr__)

    def _write(self, name: str, text: str) -> None:
        # In place: on a network's disk a new file under an old name is seen late.
        (self.folder / name).write_text(text)

    def _read_positions(self) -> dict[int, Position]:
        found = {i: read_position(self.folder / f"{i}.json") for i in range(self.num_processes)}
        return {i: position for i, position in found.items() if position is not None}

    def _read_others(self) -> list[Position]:
        return [position for i, position in self._read_positions().items() if i != self.process_id]

    def _describe_stall(self) -> str:
        before = self._read_positions()
        time.sleep(2 * self.turn_seconds)
        now = self._read_positions()
        silent = {i for i in before if i != self.process_id and now.get(i, before[i]).turn == before[i].turn}
        return describe_stall(now | {self.process_id: self.position()}, silent)

    def _announce(self, line: str) -> None:
        if self._is_over.is_set():
            return  # it went on meanwhile, to its end
        with suppress(OSError):
            self._write(VERDICT, json.dumps({"process": self.process_id, "line": line}))
        self._dump_stacks()
        logger.error(
            "%s; the stacks of all are in %s; recover_mode=auto continues from the last save", line, self.stacks
        )
        time.sleep(2 * self.turn_seconds)  # the others write their stacks
        self._leave()

    def _dump_stacks(self) -> None:
        with suppress(OSError):
            self.stacks.mkdir(parents=True, exist_ok=True)
        with suppress(OSError), (self.stacks / f"process{self.process_id}.txt").open("a") as file:
            file.write(f"--- {datetime.now().isoformat(' ', 'seconds')} process {self.process_id}: {self.position()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            if spy := shutil.which("py-spy"):
                command = [spy, "dump", "--native", "--pid", str(os.getpid())]
                with suppress(subprocess.SubprocessError):
                    subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=SPY_SECONDS)

    def _leave(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STALLED)


@contextmanager
def watch_run(logs: Path, least_seconds: float | None, compile_seconds: float | None = None) -> Iterator[Progress]:
    """While entered, no other run has this one's names, see `lock_run`, and it ends when it makes no progress."""
    with lock_run(logs), Watchdog(logs, least_seconds, compile_seconds) as progress:
        yield progress


def end_if_stuck(least_seconds: float | None) -> None:
    """Has this process end, with its stacks, when it has not come to its watchdog for as long as a start may take."""
    if least_seconds is not None and sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(LONGEST_START * least_seconds, exit=True, file=sys.__stderr__)


def read_position(path: Path) -> Position | None:
    """Returns what a process's file says, None where it says nothing, or not all of it, yet."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return Position(**{**fields, "recent": tuple(Mark(**mark) for mark in fields["recent"])})


def is_at_work(mark: Mark, positions: Iterable[Position]) -> bool:
    """Returns whether one of the other processes does what this one, at `mark`, waits for, and may take that long.

    One makes the tokens for all; one that compiles is waited for by those that have no such program, or theirs already.
    """
    return any(
        position.seconds < position.bound
        and (position.compiling is not None or (position.is_busy and position.mark == mark))
        for position in positions
    )


def describe_difference(positions: Mapping[int, Position]) -> str | None:
    """Returns a line where processes have marks of the same number that differ, None where they agree."""
    first = min(positions, default=0)
    for i, position in positions.items():
        ours = {mark.number: mark for mark in positions[first].recent}
        for mark in position.recent:
            if (other := ours.get(mark.number, mark)) != mark:
                return f"processes are in different calls: process {i} in {mark}, process {first} in {other}"
    return None


def describe_stall(positions: Mapping[int, Position], silent: frozenset[int] | set[int] = frozenset()) -> str:
    """Returns who waits for whom in which call: the `silent`, who do not answer, are waited for, or those behind."""
    least = min(position.mark.number for position in positions.values())
    behind = set(silent) or {i for i, position in positions.items() if position.mark.number == least}
    texts = []
    for i in sorted(behind)[:4]:
        texts.append(f"process {i} {'does not answer since' if i in silent else 'is in'} {positions[i]}")
    if waiting := positions.keys() - behind:
        who = f"process {min(waiting)} waits" if len(waiting) == 1 else f"processes {format_numbers(waiting)} wait"
        texts.append(f"{who} in {positions[min(waiting)].mark}")
    elif len(behind) > len(texts):
        texts = [f"all {len(behind)} processes are in {positions[min(behind)]}"]
    return ", ".join(texts)
