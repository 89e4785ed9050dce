"""Processes that run a user's reward function: one that hangs or dies costs only the answers it was asked about."""

import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from realjax.rewards.functions import Fault, Question, Reply

START_SECONDS = 300.0  # to import a module; who takes longer hangs
# A function has no business on the run's accelerators.
WITHOUT_DEVICES = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


@dataclass(eq=False)
class Worker:
    """A process, and what it is asked."""

    process: subprocess.Popen
    connection: Connection
    is_ready: bool = False
    number: int = -1  # of the question that it works on
    deadline: float | None = None

    def end(self) -> int:
        """Ends the process, and those that it has started; returns its exit code."""
        self.connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class Workers:
    """Up to `count` processes that run the function at `path`, each asked one question at a time.

    They end with this object, and with the thread that asks them first. `timeout_s` is what an answer of a question may
    take, in seconds. A process that takes longer is ended, and another one takes its place.
    """

    def __init__(self, path: str, name: str, *, count: int, timeout_s: float | None) -> None:
        self.path, self.name, self.count, self.timeout_s = path, name, count, timeout_s
        self._idle: list[Worker] = []
        weakref.finalize(self, _end_all, self._idle)  # at the latest as this process ends

    def run(self, questions: Sequence[Question], most_faults: int | None = None) -> list[Reply | None]:
        """Returns the reply to each question; None to those that are not asked any more after more than `most_faults`
        faults. Raises ValueError where the function is not there in a process.
        """
        replies: list[Reply | None] = [None for _ in questions]
        waiting, busy = deque(range(len(questions))), dict[Connection, Worker]()
        try:
            while (waiting or busy) and not _are_more(replies, most_faults):
                while waiting and len(busy) < self.count:
                    worker = self._take()
                    worker.number = waiting.popleft()
                    busy[worker.connection] = worker
                    if worker.is_ready:
                        self._ask(worker, questions)
                for connection in wait(list(busy), self._find_patience(busy)):
                    worker = busy[connection]  # pyright: ignore[reportArgumentType] - they are connections
                    if self._hear(worker, questions, replies):
                        del busy[worker.connection]
                self._end_late(busy, replies)
        finally:
            for worker in busy.values():  # of a run that ends before them
                worker.end()
        return replies

    def _take(self) -> Worker:
        """Returns a process that is there and has nothing to do, or a new one."""
        while self._idle:
            if (worker := self._idle.pop()).process.poll() is None:
                return worker
            worker.end()
        return self._start()

    def _start(self) -> Worker:
        ours, theirs = Pipe()
        # Beside the module's own folder, it finds what this process finds.
        environment = {**os.environ, **WITHOUT_DEVICES, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-m", "realjax.rewards.worker", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what it prints is no part of the command's output
            start_new_session=True,
        )
        theirs.close()
        ours.send((self.path, self.name))
        return Worker(process, ours, deadline=time.monotonic() + START_SECONDS)

    def _ask(self, worker: Worker, questions: Sequence[Question]) -> None:
        question = questions[worker.number]
        limit = None if self.timeout_s is None else self.timeout_s * len(question.answers)
        worker.deadline = None if limit is None else time.monotonic() + limit
        try:
            worker.connection.send(question)
        except BrokenPipeError:
            return  # it has died: that is heard where its reply is waited for

    def _hear(self, worker: Worker, questions: Sequence[Question], replies: list[Reply | None]) -> bool:
        """Takes in what a process says; returns whether that ends its question."""
        try:
            said = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            code = worker.end()
            if not worker.is_ready:
                raise ValueError(f"{self.name}: a process for {self.path} ended with code {code} as it began") from None
            replies[worker.number] = Fault(f"its process ended with code {code}")
            return True
        if worker.is_ready:
            replies[worker.number] = said
            self._idle.append(worker)
            return True
        if said is not None:
            worker.end()
            raise ValueError(f"{said} (in a process of reward.workers)")
        worker.is_ready = True
        self._ask(worker, questions)
        return False

    def _find_patience(self, busy: dict[Connection, Worker]) -> float | None:
        """Returns the seconds until the first process is late."""
        deadlines = [worker.deadline for worker in busy.values() if worker.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _end_late(self, busy: dict[Connection, Worker], replies: list[Reply | None]) -> None:
        now = time.monotonic()
        for connection, worker in list(busy.items()):
            if worker.deadline is None or now < worker.deadline or connection.poll():
                continue
            worker.end()
            del busy[connection]
            if not worker.is_ready:
                raise ValueError(
                    f"{self.name}: a process for {self.path} did not begin within {START_SECONDS:g} s; look at what "
                    "the module does when it is imported"
                )
            replies[worker.number] = Fault(f"no reward within reward.timeout_s={self.timeout_s:g}")


def _are_more(replies: Sequence[Reply | None], most_faults: int | None) -> bool:
    """Returns whether there are more faults than that."""
    return most_faults is not None and sum(isinstance(reply, Fault) for reply in replies) > most_faults


def _end_all(workers: list[Worker]) -> None:
    while workers:
        workers.pop().end()
