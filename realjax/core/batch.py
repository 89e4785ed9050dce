"""The value that travels down the graph: arrays whose dims have names, by key."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from realjax.core.axes import Names

Array = np.ndarray | jax.Array

PER_TOKEN: Names = ("rows", "time")
PER_SEGMENT: Names = ("rows", "segments")
# Every key that a batch may hold, and the names of its dims, which the tables of `core.axes` place. Nothing is known of
# a key that does not stand here: whoever adds one, enters it.
BATCH_DIMS: Mapping[str, Names] = {
    # what packing makes
    "tokens": PER_TOKEN,
    "segment_ids": PER_TOKEN,
    "positions": PER_TOKEN,
    # data sets
    "loss_mask": PER_TOKEN,
    "pair_weight": ("rows", "pairs"),
    "desirable": PER_SEGMENT,
    "is_other": PER_SEGMENT,
    "prompt_id": PER_SEGMENT,
    # rollouts
    "logprobs": PER_TOKEN,
    "kept": (*PER_TOKEN, "kept"),  # words of `core.draw.KeptTokens`
    "routes": (*PER_TOKEN, "routes"),  # words of `core.routes.Routes`
    "has_eos": PER_SEGMENT,
    "group": PER_SEGMENT,
    "sample_id": PER_SEGMENT,
    "is_baseline": PER_SEGMENT,
    "env_failed": PER_SEGMENT,  # answers that an environment could not bring to an end
    "turn_rewards": PER_TOKEN,  # what an environment gave for each turn, at its last token
    "num_turns": PER_SEGMENT,
    "num_retries": PER_SEGMENT,  # how often an environment was begun anew
    "token_age": PER_TOKEN,  # steps between the parameters that drew a token and those that begin to train on it
    # inference calls
    "old_logprobs": PER_TOKEN,
    "ref_logprobs": PER_TOKEN,
    "teacher_ids": (*PER_TOKEN, "choices"),  # see `core.loss.Readout`
    "teacher_logprobs": (*PER_TOKEN, "choices"),
    "scores": PER_TOKEN,
    "values": PER_TOKEN,
    # host calls
    "text_rewards": (*PER_SEGMENT, "texts"),  # of each source that reads texts
    "rewards": PER_SEGMENT,
    "is_failed": PER_SEGMENT,  # answers without a reward: nothing is learned from them, and no measure counts them
    "reward_terms": (*PER_SEGMENT, "terms"),  # what `rewards` is the weighted sum of
    "advantages": PER_TOKEN,
    "returns": PER_TOKEN,
    "old_values": PER_TOKEN,
    "train_mask": PER_TOKEN,
    "seq_share": PER_SEGMENT,
    "correction": PER_TOKEN,
    "kl_baseline": PER_SEGMENT,
    # what a model call adds for itself
    "targets": ("rows", "targets"),
}

_HOST_DTYPES = {"b": np.bool_, "i": np.int32, "u": np.int32, "f": np.float32}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Packed rows: arrays by key, with the dims that `BATCH_DIMS` says; a pytree with static keys.

    Per-token arrays are aligned with the token they speak of. `segment_ids` is 0 at padding and 1..S from the left.
    """

    arrays: dict[str, Array]

    @classmethod
    def of(cls, **arrays: ArrayLike) -> "Batch":
        """Batch of the given arrays, host ones as int32, bool or float32.

        ValueError for an unknown key, and where dims are not those of the key or of one name have two sizes.
        """
        converted = {key: _as_conventional(key, array) for key, array in arrays.items()}
        _check_dims(converted)
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

    def with_arrays(self, **arrays: ArrayLike) -> "Batch":
        """This batch with more keys; ValueError where a key would change its array, and as `of` does."""
        for key, array in arrays.items():
            if key in self.arrays and self.arrays[key] is not array:
                raise ValueError(f"batch: key {key!r} is there already; give the new array another name")
        merged = self.arrays | {key: _as_conventional(key, array) for key, array in arrays.items()}
        _check_dims(merged)
        return Batch(arrays=merged)

    def replace_arrays(self, **arrays: Array) -> "Batch":
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


def find_dims(key: str) -> Names:
    """The names of a key's dims; ValueError for a key that is not known."""
    if key not in BATCH_DIMS:
        raise ValueError(
            f"batch: the dims of key {key!r} have no names; enter the key in BATCH_DIMS of realjax/core/batch.py, "
            f"which has {', '.join(sorted(BATCH_DIMS))}"
        )
    return BATCH_DIMS[key]


def is_per_token(key: str) -> bool:
    """Whether a key has an entry for each token; otherwise it has one for each sequence. ValueError as `find_dims`."""
    return "time" in find_dims(key)


def is_per_segment(key: str) -> bool:
    """Whether a key has one number for each sequence. ValueError as `find_dims`."""
    return find_dims(key) == PER_SEGMENT


def _as_conventional(key: str, array: ArrayLike) -> Array:
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


def _check_dims(arrays: Mapping[str, Array]) -> None:
    if not arrays:
        raise ValueError("batch: found no array; needed at least one")
    sizes: dict[str, tuple[int, str]] = {}
    for key, array in arrays.items():
        names = find_dims(key)
        if array.ndim != len(names):
            raise ValueError(f"batch: {key!r} has shape {array.shape}; its dims are {', '.join(names)}")
        for name, size in zip(names, array.shape, strict=True):
            expected, other = sizes.setdefault(name, (size, key))
            if size != expected:
                raise ValueError(
                    f"batch: {key!r} has shape {array.shape}, {size} {name}, but {other!r} has {expected} of them; "
                    "a dim has one size in a batch"
                )
