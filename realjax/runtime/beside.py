"""Host calls that run beside others: in a thread of the first process, whose results all processes get."""

import pickle
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import jax

from realjax.core.host_call import Arrays, HostResult, State
from realjax.core.processes import Mailbox, is_first
from realjax.dataflow.graph import Host


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a call found, and when it ran, in seconds since the run began."""

    result: HostResult
    start: float
    end: float


# None ends the thread.
Orders = queue.SimpleQueue[tuple[Future[Finished], Callable[[], Finished]] | None]


class Beside:
    """Runs host calls one after the other in one thread, which ends with the process whatever a call does."""

    def __init__(self, now_fn: Callable[[], float]) -> None:
        self._now_fn = now_fn
        self._queue: Orders | None = None
        self._futures: dict[str, Future[Finished]] = {}
        self._mailbox: Mailbox | None = None

    def begin(self, call: Host, arrays: Arrays, state: State) -> None:
        """Starts a call. Every process must call this."""
        if self._mailbox is None and jax.process_count() > 1:
            self._mailbox = Mailbox("beside")
        if not is_first():
            return
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._queue,), daemon=True, name="beside").start()
            weakref.finalize(self, self._queue.put, None)

        def run() -> Finished:
            start = self._now_fn()
            return Finished(result=call.fn(arrays, state), start=start, end=self._now_fn())

        self._futures[call.name] = Future()
        self._queue.put((self._futures[call.name], run))

    def finish(self, name: str) -> Finished:
        """Returns what a call that was started has found, when it is there. Every process must call this."""
        found = self._futures.pop(name).result() if is_first() else None
        if self._mailbox is None:
            assert found is not None, "of one process, it is the first"
            return found
        return pickle.loads(self._mailbox.send(None if found is None else pickle.dumps(found), source=0))


def _work(orders: Orders) -> None:
    while (order := orders.get()) is not None:
        future, run = order
        try:
            future.set_result(run())
        except BaseException as error:  # for whoever waits for it
            future.set_exception(error)
        del future, run, order  # what they hold is not held until the next one comes
