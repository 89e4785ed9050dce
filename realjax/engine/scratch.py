"""The scratch of programs on CPUs: it is the process's own memory, and stays with it from one program to the next."""

import time
from functools import cached_property

import jax

from realjax.core.host_memory import total_bytes
from realjax.core.malloc import give_back_beyond

MOST = 1 / 8  # of the memory that this process may have, for what is kept and what the next program takes together


class HostScratch:
    """Keeps what programs on CPUs have freed for the next ones, where it is not much or the same program runs again.

    Other platforms' devices have memory of their own: there it does nothing.
    """

    def __init__(self) -> None:
        self._last = 0  # bytes that the program before took

    @cached_property
    def _most(self) -> int | None:
        return int(total_bytes() * MOST) if jax.default_backend() == "cpu" else None

    def make_room(self, needed: int, args: object) -> None:
        """Prepares for a program that takes so many bytes and is about to run with these arguments.

        XLA takes them as soon as the program is called. A process's only device has nothing else to do until the
        arguments are there, so the host waits for them: then one block serves one program after the other.
        """
        if self._most is None:
            return
        if jax.local_device_count() == 1:
            jax.block_until_ready(args)
            if needed * 8 > self._most:
                time.sleep(0.002)  # the program before gives back what it took just after its results are there
        again = needed * 1.1 if needed == self._last else 0  # the block that it had, and what came of it
        give_back_beyond(int(max(self._most - needed, again)))
        self._last = needed
