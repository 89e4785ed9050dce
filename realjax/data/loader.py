"""Packed batches of a dataset, as a pure function of the step."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from realjax.core.batch import Batch
from realjax.core.identity import digest
from realjax.data.packing import (
    MOST_TOKENS,
    bucket_len,
    count_rows,
    fit_rows,
    pack,
    pack_rows,
    target_indices,
)

# Positions in the stream are int32, and each step is planned before the first.
MOST_SAMPLES = 2**27
# Of the samples packed to find the best length of rows.
_MOST_TRIED = 2**15


class Dataset(Protocol):
    """What the loader asks of a dataset of N examples."""

    @property
    def ids(self) -> Sequence[str | int]:
        """The rows' names."""
        ...

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """A text that changes with whatever a run reads of the examples."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [N]."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; an example may hold several."""
        ...

    @property
    def num_targets(self) -> np.ndarray | None:
        """Tokens of each example that are learned, those of its `loss_mask`, int32 [N]; None where it has none."""
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


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The static shapes of a run's batches: rows [R, T] for a few R and one T, with [R, S] beside them."""

    row_len: int
    num_segments: int
    row_counts: tuple[int, ...]  # ascending
    num_rows: np.ndarray  # R of each step's batch, int [num_steps]

    @property
    def num_slots(self) -> int:
        """Token slots of all steps, full or not."""
        return int(self.num_rows.sum(dtype=np.int64)) * self.row_len

    def __str__(self) -> str:
        return f"{' or '.join(map(str, self.row_counts))} x {self.row_len}"


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for subject, size in sizes.items():
        if size < 1:
            raise ValueError(f"{subject}: found {size}; needed at least 1")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How many rows batches have, a multiple of `multiple` in equal blocks for `num_shards`, and of how many tokens.

    `row_len` None: see `plan_shapes`. Batches have at most `max_shapes` shapes. Raises ValueError for sizes below 1.
    """

    multiple: int = 1
    num_shards: int = 1
    row_len: int | None = None
    max_shapes: int = 3

    def __post_init__(self) -> None:
        _check_sizes({"row_multiple": self.multiple, "num_shards": self.num_shards, "max_shapes": self.max_shapes})

    @property
    def step(self) -> int:
        """What the number of rows is a multiple of."""
        return math.lcm(self.multiple, self.num_shards)


class Loader:
    """Batches of few static shapes; `batch(step)` depends on the arguments and the step only, so a resume repeats it.

    The stream of samples is the epochs' permutations one after the other, each from (seed, epoch); step t takes
    the next `batch_size` of it. A batch may straddle two epochs and the last may be smaller: nothing is dropped, every
    sample is used `num_epochs` times.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        num_epochs: int = 1,
        in_order: bool = False,
        rows: Rows = Rows(),  # noqa: B008 - frozen
        name: str = "dataset.train_bs_n_seqs",
    ):
        """`in_order`, for evaluation and for answers, keeps the dataset's order, and a batch may then exceed it.

        Raises ValueError, naming `name` (the option with the batch size), for sizes below 1, a batch larger than the
        dataset, or rows shorter than an example; `shapes` raises for too large batches.
        """
        _check_sizes({name: batch_size, "epochs": num_epochs})
        if seed < 0:
            raise ValueError(f"seed: found {seed}; needed 0 or more, as numpy's generators ask")
        self._dataset, self._seed, self._shuffles = dataset, seed, not in_order
        self._lengths = dataset.lengths
        self.batch_size, self._name = batch_size, name
        first = dataset.order(seed, 0, not in_order)
        self._epoch_len = len(first)
        if (num_samples := num_epochs * self._epoch_len) > MOST_SAMPLES:
            raise ValueError(
                f"total_train_epochs: {num_epochs} passes over {self._epoch_len} examples are {num_samples} samples, "
                f"but a run takes at most {MOST_SAMPLES}; set it to {max(1, MOST_SAMPLES // self._epoch_len)} or less"
            )
        orders = [first, *(dataset.order(seed, epoch, not in_order) for epoch in range(1, num_epochs))]
        self._stream = np.concatenate(orders).astype(np.int32)
        self._first_order = self._stream[: self._epoch_len]
        self.longest = dataset.longest
        if batch_size > self._epoch_len and not in_order:
            raise ValueError(
                f"{name}: a batch of {batch_size} is more than the dataset's {self._epoch_len} examples; "
                f"set it to {self._epoch_len} or less, or add data"
            )
        self.longest_example = int(self._lengths.max())
        self._rows = rows
        if rows.row_len is not None and rows.row_len < self.longest_example:
            raise ValueError(
                f"loader: rows of {rows.row_len} tokens, but the longest example has {self.longest_example}; use that "
                "or more"
            )

    def split(self, rows: Rows) -> "Loader":
        """Returns the loader of the same sequences, step by step, in other rows. Raises ValueError as `shapes`."""
        loader = copy.copy(self)
        loader._rows = rows
        loader._forget_shapes()
        _ = loader.shapes
        return loader

    def first_steps(self, num_steps: int | None) -> "Loader":
        """Returns the loader of no more than so many steps; all of them for None."""
        if num_steps is None:
            return self
        loader = copy.copy(self)
        loader._forget_shapes()
        loader._stream = self._stream[: num_steps * self.batch_size]
        return loader

    def _forget_shapes(self) -> None:
        for name in ("shapes", "num_targets"):
            self.__dict__.pop(name, None)

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of all batches. Raises ValueError for more tokens in a batch than XLA can count."""
        batches = [self.lengths(step) for step in range(self.total_steps)]
        multiple, row_len, max_shapes = self._rows.step, self._rows.row_len, self._rows.max_shapes
        if row_len is None:
            shapes = plan_shapes(batches, multiple, max_shapes)
        else:
            shapes = make_shapes(batches, row_len, multiple, max_shapes)
        num_rows, name = shapes.row_counts[-1], self._name
        if num_rows * shapes.row_len > MOST_TOKENS:
            raise ValueError(
                f"{name}: a batch would be {num_rows} rows of {shapes.row_len} tokens, rows being a multiple of "
                f"{multiple} (devices times n_mbs), but it has at most {MOST_TOKENS} tokens; lower {name} or n_mbs"
            )
        return shapes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, T, S) of the largest batches: rows, tokens per row, sequences per row."""
        return self.shapes.row_counts[-1], self.shapes.row_len, self.shapes.num_segments

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: epochs * examples / batch size, rounded up."""
        return math.ceil(len(self._stream) / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Examples / batch size, rounded up; one less where the epoch before ended inside a batch."""
        return math.ceil(self._epoch_len / self.batch_size)

    @property
    def padding_share(self) -> float:
        """Share of the token slots that hold no token, over the whole run."""
        return 1.0 - float(self._lengths[self._stream].sum(dtype=np.int64)) / self.shapes.num_slots

    @property
    def fingerprint(self) -> str:
        """A text that changes with the batch size, the examples' content, or their first epoch's order."""
        return digest(str(self.batch_size), self._first_order, self._dataset.fingerprint)

    def steps_in(self, num_epochs: int) -> int:
        """Steps that a run of so many epochs of this data takes."""
        return math.ceil(self._epoch_len * num_epochs / self.batch_size)

    @cached_property
    def num_targets(self) -> int:
        """P, a bound for the tokens of a row that are learned, of all batches: a multiple of a sixteenth of the row.

        T where it would save less than an eighth of the row, or nothing says which tokens are learned.
        """
        counts, row_len, most = self._dataset.num_targets, self.shapes.row_len, 0
        if counts is None:
            return row_len
        step = -(-row_len // 16)
        for indices in map(self._indices, range(self.total_steps)):
            rows = fit_rows(self._lengths[indices], row_len)
            most = max(most, *(int(counts[indices[list(row)]].sum()) for row in rows))
            if most > row_len - 2 * step:
                return row_len
        return max(1, math.ceil(most / step)) * step

    def batch(self, step: int) -> Batch:
        """Batch [R, T] of the step, counted from 0, on the host; ValueError outside [0, total_steps).

        It has `targets` where these are fewer than tokens: nobody asks about others.
        """
        indices = self._indices(step)
        num_rows, row_len = int(self.shapes.num_rows[step]), self.shapes.row_len
        plan = pack_rows(self._lengths[indices], row_len, num_rows=num_rows, num_shards=self._rows.num_shards)
        batch = pack([self._dataset.example(i) for i in indices], plan, num_segments=self.shapes.num_segments)
        if self.num_targets == row_len:
            return batch
        targets = target_indices(batch["loss_mask"], batch["positions"], self.num_targets)
        return batch.with_arrays(**({} if targets is None else {"targets": targets}))

    def take(self, start: int, count: int) -> Batch:
        """Batch of `count` samples of the stream from place `start` on, which may lie beyond the run's epochs."""
        places = np.arange(start, start + count)
        epochs, within = np.divmod(places, self._epoch_len)
        orders = {epoch: self._dataset.order(self._seed, epoch, self._shuffles) for epoch in np.unique(epochs).tolist()}
        indices = [int(orders[epoch][i]) for epoch, i in zip(epochs.tolist(), within.tolist(), strict=True)]
        plan = pack_rows(self._lengths[indices], bucket_len(self.longest_example))
        return pack([self._dataset.example(i) for i in indices], plan)

    @property
    def epoch_len(self) -> int:
        """Samples of an epoch."""
        return self._epoch_len

    def ids(self, step: int) -> list[str | int]:
        """Ids of the step's examples, in the stream's order; a batch that straddles two epochs may hold one twice."""
        return [self._dataset.ids[i] for i in self._indices(step)]

    def lengths(self, step: int) -> np.ndarray:
        """Tokens of the step's examples, int32 [N], in the stream's order."""
        return self._lengths[self._indices(step)]

    def position(self, step: int) -> Position:
        """Where the run stands when this step (from 0) is done; `ends_epoch` when it used its epoch's last sample."""
        start = self._start(step)
        num_examples = self._epoch_len
        epoch = start // num_examples
        first_step = -(-epoch * num_examples // self.batch_size)
        return Position(
            epoch=epoch + 1,
            epoch_step=step - first_step + 1,
            global_step=step + 1,
            ends_epoch=start + self.batch_size >= (epoch + 1) * num_examples,
        )

    def _start(self, step: int) -> int:
        if not 0 <= step < self.total_steps:
            raise ValueError(f"loader: step {step} is outside this run's {self.total_steps} steps, counted from 0")
        return step * self.batch_size

    def _indices(self, step: int) -> np.ndarray:
        start = self._start(step)
        return self._stream[start : start + self.batch_size]


def plan_shapes(batches: Sequence[np.ndarray], row_multiple: int, max_shapes: int = 1) -> Shapes:
    """Returns the shapes that pad least and hold `batches`, the lengths of each step's examples.

    Rows are one to eight times as long as the bucket of the longest example: longer ones pack tighter, and attention
    looks no further back than the longest example, so they cost no more.
    """
    shortest = bucket_len(max(int(lengths.max()) for lengths in batches))
    # Of many steps some tell which length is best: packing all of them so often would take minutes.
    tried = batches[:: max(1, sum(map(len, batches)) // _MOST_TRIED)]
    found = [make_shapes(tried, row_len, row_multiple, max_shapes) for row_len in _row_lens(shortest)]
    best = min(found, key=lambda shapes: shapes.num_slots)
    return best if len(tried) == len(batches) else make_shapes(batches, best.row_len, row_multiple, max_shapes)


def _row_lens(shortest: int) -> list[int]:
    """Returns the row lengths to choose from: up to eight times the shortest, in steps of a quarter of it.

    Steps are multiples of 64 tokens, so that rows fall into blocks of attention; short rows go by their own length.
    """
    step = max(1, shortest // 256) * 64
    return sorted(
        {shortest * times for times in range(1, 9)} | set(range(-(-shortest // step) * step, 8 * shortest, step))
    )


def make_shapes(batches: Sequence[np.ndarray], row_len: int, row_multiple: int, max_shapes: int = 1) -> Shapes:
    """Returns the shapes with rows of `row_len` tokens that hold `batches`: at most `max_shapes`, a compile each."""
    counts = np.array([count_rows(lengths, row_len) for lengths in batches])
    needed = -(-counts[:, 0] // row_multiple) * row_multiple
    row_counts = _row_counts(needed, max_shapes)
    return Shapes(
        row_len=row_len,
        num_segments=int(counts[:, 1].max()),
        row_counts=tuple(row_counts.tolist()),
        num_rows=row_counts[np.searchsorted(row_counts, needed)],
    )


def _row_counts(needed: np.ndarray, max_shapes: int) -> np.ndarray:
    """Returns up to `max_shapes` numbers of rows, ascending, for steps that need as many rows as `needed` says.

    One that holds every step, and then whichever other saves most, as long as it saves a tenth of all rows.
    """
    of_step = np.full_like(needed, needed.max())
    for _ in range(max_shapes - 1):
        with_another = [np.where(needed <= n, np.minimum(of_step, n), of_step) for n in np.unique(needed)]
        best = min(with_another, key=np.sum)
        if best.sum() > 0.9 * of_step.sum():
            break
        of_step = best
    return np.unique(of_step)
