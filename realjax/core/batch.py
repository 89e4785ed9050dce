"""The value that travels down the graph: named arrays that share a leading row dim."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Array = np.ndarray | jax.Array

_HOST_DTYPES = {"b": np.bool_, "i": np.int32, "u": np.int32, "f": np.float32}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Packed rows: per-token arrays [R, T, ...] and per-sequence arrays [R, S, ...] by name; a pytree with static keys.

    Per-token arrays are aligned with the token they speak of. `segment_ids` is 0 at padding and 1..S from the left.
    """

    arrays: dict[str, Array]

    @classmethod
    def of(cls, **arrays: Any) -> "Batch":
        """Batch of the given arrays, host ones as int32, bool or float32; ValueError where they share no row dim."""
        converted = {key: _as_conventional(key, array) for key, array in arrays.items()}
        _check_rows(converted)
        return cls(arrays=converted)

    def __getitem__(self, key: str) -> Any:
        if key not in self.arrays:
            raise ValueError(f"batch: no key {key!r}; it holds {', '.join(self.keys())}")
        return self.arrays[key]

    def get(self, key: str) -> Any:
        """The array, None where there is none of this name."""
        return self.arrays.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Names of the arrays, sorted."""
        return tuple(sorted(self.arrays))

    @property
    def num_rows(self) -> int:
        """R."""
        return next(iter(self.arrays.values())).shape[0]

    @property
    def row_len(self) -> int:
        """T."""
        return self["tokens"].shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding; ValueError for device arrays, where counting would wait for the device."""
        segment_ids = self["segment_ids"]
        if not isinstance(segment_ids, np.ndarray):
            raise ValueError(
                "batch: num_tokens needs host arrays, found segment_ids on a device; count before placing it"
            )
        return int(np.count_nonzero(segment_ids))

    def with_arrays(self, **arrays: Any) -> "Batch":
        """This batch with more keys; ValueError where a key would change its array or the row dim differs."""
        for key, array in arrays.items():
            if key in self.arrays and self.arrays[key] is not array:
                raise ValueError(f"batch: key {key!r} is there already; give the new array another name")
        merged = self.arrays | {key: _as_conventional(key, array) for key, array in arrays.items()}
        _check_rows(merged)
        return Batch(arrays=merged)

    def replace_arrays(self, **arrays: Any) -> "Batch":
        """This batch with other arrays for keys that it has, such as host copies; ValueError for a new key."""
        if missing := sorted(set(arrays) - set(self.arrays)):
            raise ValueError(f"batch: no key {missing[0]!r} to replace; it holds {', '.join(self.keys())}")
        return Batch(arrays=self.arrays | arrays)

    def select(self, keys: Iterable[str]) -> "Batch":
        """Batch of these keys only; ValueError for a key that is not there."""
        return Batch(arrays={key: self[key] for key in keys})

    def rows(self, rows: slice) -> "Batch":
        """Batch of a slice of the rows."""
        return Batch(arrays={key: array[rows] for key, array in self.arrays.items()})


def _as_conventional(key: str, array: Any) -> Array:
    if isinstance(array, jax.Array):
        return array
    array = np.asarray(array)
    dtype = _HOST_DTYPES.get(array.dtype.kind)
    if dtype is None:
        raise ValueError(f"batch: {key!r} has dtype {array.dtype}; needed integers, floats or booleans")
    if array.dtype.kind in "iu" and array.dtype.itemsize >= 4 and array.size:
        limits = np.iinfo(np.int32)
        if array.max() > limits.max or array.min() < limits.min:
            raise ValueError(f"batch: {key!r} holds values from {array.min()} to {array.max()}; int32 is the widest")
    return array.astype(dtype, copy=False)


def _check_rows(arrays: Mapping[str, Array]) -> None:
    shapes = {key: tuple(array.shape) for key, array in arrays.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1 or () in shapes.values():
        found = ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items())) or "no array"
        raise ValueError(f"batch: arrays must share their leading dim, the rows; found {found}")
