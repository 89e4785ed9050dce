"""What the processes of a run agree on: values that only one of them knows, or that each has its own of."""

from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Returns whether this process writes what a run writes once."""
    return jax.process_index() == 0


def from_first(value: float) -> float:
    """Returns the first process's value in every process. Every process must call this."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float64(value)))


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
