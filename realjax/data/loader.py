"""Packed batches of a dataset, as a pure function of the step."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from realjax.core.batch import Batch
from realjax.data.packing import bucket_len, pack, pack_rows


class Dataset(Protocol):
    """What the loader asks of a dataset of N examples."""

    @property
    def ids(self) -> tuple[str | int, ...]:
        """The rows' names."""
        ...

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [N]."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; an example may hold several."""
        ...

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of an epoch's examples in order: as many in each epoch."""
        ...

    def example(self, index: int) -> dict[str, np.ndarray]:
        """Arrays of one example, per token [L] or 0-d."""
        ...


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after a step; numbers count from 1. A step that straddles two epochs belongs to the first."""

    epoch: int
    epoch_step: int
    global_step: int
    ends_epoch: bool


class Loader:
    """Batches of one static shape; `batch(step)` depends on the arguments and the step only, so a resume repeats it.

    The stream of samples is the epochs' permutations one after the other, each from (seed, epoch); step t takes
    the next `batch_size` of it. A batch may straddle two epochs and the last may be smaller: nothing is dropped, every
    sample is used `num_epochs` times.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        num_epochs: int,
        seed: int,
        row_multiple: int = 1,
        shuffle: bool = True,
        row_len: int | None = None,
        num_shards: int = 1,
        allow_partial: bool = False,
        name: str = "dataset.train_bs_n_seqs",
    ):
        """Rows are a multiple of `row_multiple` and of `num_shards`, of `row_len` tokens (None: see `plan_shape`).

        `allow_partial` lets the batch exceed the dataset, for evaluation. Raises
        ValueError, naming `name` (the option with the batch size), for sizes below 1, a batch larger than the dataset,
        or rows shorter than an example.
        """
        _check_sizes(batch_size, num_epochs, seed, row_multiple, num_shards, name)
        self._dataset = dataset
        self._lengths = dataset.lengths
        self._batch_size = batch_size
        self._num_shards = num_shards
        orders = [dataset.order(seed, epoch, shuffle) for epoch in range(num_epochs)]
        self._epoch_len = len(orders[0])
        self._stream = np.concatenate(orders).astype(np.int32)
        self.longest = dataset.longest
        if batch_size > self._epoch_len and not allow_partial:
            raise ValueError(
                f"{name}: a batch of {batch_size} is more than the dataset's {self._epoch_len} examples; "
                f"set it to {self._epoch_len} or less, or add data"
            )
        longest_example = int(self._lengths.max())
        if row_len is not None and row_len < longest_example:
            raise ValueError(
                f"loader: rows of {row_len} tokens, but the longest example has {longest_example}; use that or more"
            )
        batches = [self._lengths[self._indices(step)] for step in range(self.total_steps)]
        multiple = math.lcm(row_multiple, num_shards)
        self._shape = plan_shape(batches, multiple) if row_len is None else shape_of(batches, row_len, multiple)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, T, S) of every batch: rows, tokens per row, sequences per row."""
        return self._shape

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: epochs * examples / batch size, rounded up."""
        return math.ceil(len(self._stream) / self._batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Examples / batch size, rounded up; one less where the epoch before ended inside a batch."""
        return math.ceil(self._epoch_len / self._batch_size)

    @property
    def padding_share(self) -> float:
        """Share of the token slots that hold no token, over the whole run."""
        num_rows, row_len, _ = self._shape
        return 1.0 - float(self._lengths[self._stream].sum(dtype=np.int64)) / (self.total_steps * num_rows * row_len)

    @property
    def fingerprint(self) -> int:
        """A number that changes with the batch size, the examples' ids and lengths, or their first epoch's order."""
        first = self._stream[: self._epoch_len]
        ids = repr([self._dataset.ids[i] for i in first]).encode()
        return zlib.crc32(ids + self._lengths[first].tobytes(), self._batch_size)

    def batch(self, step: int) -> Batch:
        """Batch [R, T] of the step, counted from 0, on the host; ValueError outside [0, total_steps)."""
        indices = self._indices(step)
        num_rows, row_len, num_segments = self._shape
        plan = pack_rows(self._lengths[indices], row_len, num_rows=num_rows, num_shards=self._num_shards)
        return pack([self._dataset.example(i) for i in indices], plan, num_segments=num_segments)

    def ids(self, step: int) -> list[str | int]:
        """Ids of the step's examples, in the stream's order; a batch that straddles two epochs may hold one twice."""
        return [self._dataset.ids[i] for i in self._indices(step)]

    def position(self, step: int) -> Position:
        """Where the run stands when this step (from 0) is done; `ends_epoch` when it used its epoch's last sample."""
        start = self._start(step)
        num_examples = self._epoch_len
        epoch = start // num_examples
        first_step = -(-epoch * num_examples // self._batch_size)
        return Position(
            epoch=epoch + 1,
            epoch_step=step - first_step + 1,
            global_step=step + 1,
            ends_epoch=start + self._batch_size >= (epoch + 1) * num_examples,
        )

    def _start(self, step: int) -> int:
        if not 0 <= step < self.total_steps:
            raise ValueError(f"loader: step {step} is outside this run's {self.total_steps} steps, counted from 0")
        return step * self._batch_size

    def _indices(self, step: int) -> np.ndarray:
        start = self._start(step)
        return self._stream[start : start + self._batch_size]


def plan_shape(batches: Sequence[np.ndarray], row_multiple: int) -> tuple[int, int, int]:
    """Returns the (R, T, S) that pads least and holds every one of `batches`, the lengths of a step's examples.

    Rows are one to eight times the bucket of the longest example: longer ones pack tighter, and attention looks no
    further back than the longest example, so they cost no more. One shape for all steps: a run compiles one program.
    """
    shortest = bucket_len(max(int(lengths.max()) for lengths in batches))
    shapes = [shape_of(batches, shortest * times, row_multiple) for times in range(1, 9)]
    return min(shapes, key=lambda shape: shape[0] * shape[1])


def shape_of(batches: Sequence[np.ndarray], row_len: int, row_multiple: int) -> tuple[int, int, int]:
    """Returns the (R, T, S) of rows of `row_len` tokens that holds every one of `batches`."""
    plans = (pack_rows(lengths, row_len) for lengths in batches)
    num_rows, num_segments = map(max, zip(*((len(plan.rows), plan.num_segments) for plan in plans), strict=True))
    return -(-num_rows // row_multiple) * row_multiple, row_len, num_segments


def _check_sizes(batch_size: int, num_epochs: int, seed: int, row_multiple: int, num_shards: int, name: str) -> None:
    sizes = {name: batch_size, "epochs": num_epochs, "row_multiple": row_multiple, "num_shards": num_shards}
    for subject, size in sizes.items():
        if size < 1:
            raise ValueError(f"{subject}: found {size}; needed at least 1")
    if seed < 0:
        raise ValueError(f"seed: found {seed}; needed 0 or more, as numpy's generators ask")
