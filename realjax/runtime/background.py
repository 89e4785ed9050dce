"""Writes that go on beside the steps, one after the other, and whoever has to wait for them."""

import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax

from realjax.core.faults import RunFault
from realjax.core.processes import await_note, from_first, leave_note

DONE = "done"


class BackgroundWrites:
    """Each write is made by a thread of one process; all processes know in the same order of all of them.

    What a write raised is raised in its process by `check` and `wait`.
    """

    def __init__(self) -> None:
        """Every process must make it."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writes")
        self._name = f"realjax/writes-{int(from_first(random.randrange(2**24)))}"
        self._num_begun = 0
        self._under_way: list[Future[None]] = []  # of this process
        self._elsewhere: list[tuple[str, int]] = []  # keys and processes of what others write

    def begin(self, write_fn: Callable[[], None], writer: int) -> None:
        """Has the process `writer` call `write_fn`; every process must call this, the function is its own."""
        key, self._num_begun = f"{self._name}/{self._num_begun}", self._num_begun + 1
        if jax.process_index() == writer:
            self._under_way.append(self._pool.submit(_write_and_tell, write_fn, key))
        elif jax.process_index() == 0:
            self._elsewhere.append((key, writer))

    def check(self) -> None:
        """Raises what a write that has ended raised; waits for none."""
        ended = [write for write in self._under_way if write.done()]
        self._under_way = [write for write in self._under_way if write not in ended]
        for write in ended:
            write.result()

    def wait(self) -> None:
        """Returns when this process's writes are done."""
        under_way, self._under_way = self._under_way, []
        for write in under_way:
            write.result()

    def make_barrier(self) -> Callable[[], None]:
        """Returns what waits, in any thread, for all that was begun up to now: in the first process also elsewhere.

        Raises what a write raised, RunFault for one of another process.
        """
        elsewhere, self._elsewhere = self._elsewhere, []
        return partial(_await, [*self._under_way], elsewhere)

    def close(self) -> None:
        """Waits for this process's writes, and raises what one of them raised."""
        self._pool.shutdown()
        self.wait()


def _write_and_tell(write_fn: Callable[[], None], key: str) -> None:
    is_told = jax.process_count() > 1 and jax.process_index() != 0  # the first process is the one that asks
    try:
        write_fn()
    except BaseException as error:
        if is_told:
            leave_note(key, str(error) or type(error).__name__)
        raise
    if is_told:
        leave_note(key, DONE)


def _await(own: list[Future[None]], elsewhere: list[tuple[str, int]]) -> None:
    for write in own:
        write.result()
    for key, process in elsewhere:
        if (answer := await_note(key)) != DONE:
            raise RunFault(f"process {process} could not write: {answer}")
