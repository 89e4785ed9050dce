"""What the processes of a run agree on: values that only one of them knows, or that each has its own of."""

import importlib
import os
import random
from collections import deque
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils

# JAX has no public name for the store of its coordinator.
STORE = "jax._src.distributed"
PIECE_BYTES = 2**20
WAIT_SECONDS = 7 * 24 * 3600  # of a process that is lost, the coordinator tells earlier


def is_first() -> bool:
    """Returns whether this process writes what a run writes once."""
    return jax.process_index() == 0


def count_cores() -> int:
    """Returns how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def from_first(value: float) -> float:
    """Returns the first process's value in every process. Every process must call this."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float64(value)))


def array_from_first(values: np.ndarray) -> np.ndarray:
    """Returns the first process's array in every process. Every process must call this."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def text_from_first(text: str, size: int = 256) -> str:
    """Returns the first process's text (at most `size` bytes) in every process. Every process must call this."""
    if jax.process_count() == 1:
        return text
    padded = np.frombuffer(text.encode().ljust(size, b"\0"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b"\0").decode()


def largest(value: int) -> int:
    """Returns the largest of every process's values. Every process must call this."""
    return value if jax.process_count() == 1 else int(gather(np.array(float(value))).max())


def gather(values: np.ndarray) -> np.ndarray:
    """Returns the float64 `values` of every process, `[num_processes, *values.shape]`. Every process must call this."""
    # As integers: floats would travel in single precision.
    bits = multihost_utils.process_allgather(values.astype(np.float64).ravel().view(np.uint32))
    return np.asarray(bits, np.uint32).view(np.float64).reshape(-1, *values.shape)


def format_numbers(numbers: Iterable[int]) -> str:
    """Returns numbers in order, those that follow each other as a range: "0-3,7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def leave_note(key: str, text: str) -> None:
    """Has the coordinator keep a text under a key of its own, for one process that awaits it."""
    importlib.import_module(STORE).global_state.client.key_value_set(key, text)


def await_note(key: str) -> str:
    """Returns the text that another process leaves under the key, as soon as it is there."""
    client = importlib.import_module(STORE).global_state.client
    text: str = client.blocking_key_value_get(key, WAIT_SECONDS * 1000)
    client.key_value_delete(key)
    return text


class Mailbox:
    """Messages from one process to all others by way of the coordinator, past the devices: what these do goes on."""

    def __init__(self, name: str) -> None:
        """Every process must make it, with the same name, and send the same number of messages."""
        # Another box of the name may have left messages behind.
        self.name, self._num_sent = f"{name}-{int(from_first(random.randrange(2**24)))}", 0
        self._sent: deque[list[str]] = deque()  # keys of messages that the coordinator holds, by round
        self._round: list[str] | None = None

    def send(self, message: bytes | None, source: int) -> bytes:
        """Returns the message of the process `source` in every process; in the others it is not looked at."""
        number, self._num_sent = self._num_sent, self._num_sent + 1
        client = importlib.import_module(STORE).global_state.client
        key = f"realjax/{self.name}/{number}"
        if jax.process_index() == source:
            assert message is not None, "the source has a message"
            pieces = [message[at : at + PIECE_BYTES] for at in range(0, len(message), PIECE_BYTES)]
            for i, piece in enumerate(pieces):
                client.key_value_set_bytes(f"{key}/{i}", piece)
            client.key_value_set(key, str(len(pieces)))
            keys = [key, *(f"{key}/{i}" for i in range(len(pieces)))]
            if self._round is None:
                self._forget(keys)
            else:
                self._round += keys
            return message
        num_pieces = int(client.blocking_key_value_get(key, WAIT_SECONDS * 1000))
        return b"".join(
            client.blocking_key_value_get_bytes(f"{key}/{i}", WAIT_SECONDS * 1000) for i in range(num_pieces)
        )

    def end_round(self) -> None:
        """Begins another round of messages: those of a round are kept until two more have begun.

        For many in a row, which some processes may be slow to read. Without rounds each message is one.
        """
        if self._round is not None:
            self._forget(self._round)
        self._round = []

    def _forget(self, keys: list[str]) -> None:
        """Removes the messages of the round before the last one: whoever sent or took something since has read them."""
        self._sent.append(keys)
        client = importlib.import_module(STORE).global_state.client
        while len(self._sent) > 2:
            for key in self._sent.popleft():
                client.key_value_delete(key)
