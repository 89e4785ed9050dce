"""Sequences of different lengths into rows of one length, and back."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from realjax.core.batch import Batch, find_dims, is_per_segment, is_per_token
from realjax.core.segments import segment_slices

# Of a batch: XLA counts the entries of an array in 32 bits.
MOST_TOKENS = 2**31 - 1

# The key of an example that is several sequences: their lengths.
PART_LENS = "part_lens"


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Which sequence sits in which row, in order from the left; a row may be empty."""

    row_len: int
    rows: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    @property
    def num_segments(self) -> int:
        """S, the sequences of the fullest row."""
        return max(map(len, self.rows), default=0)

    def places(self) -> Iterator[tuple[int, int, int, slice]]:
        """Yields (sequence, row, segment from 0, slice of tokens)."""
        for row, members in enumerate(self.rows):
            start = 0
            for segment, index in enumerate(members):
                end = start + self.lengths[index]
                yield index, row, segment, slice(start, end)
                start = end


def bucket_len(n: int, buckets: Sequence[int] | None = None) -> int:
    """Smallest bucket >= n: by default 32, 64, 96, 128, then powers of two and their midpoints (192, 256, 384, ...)."""
    if n < 1:
        raise ValueError(f"bucket_len: found {n} tokens; needed at least 1")
    if buckets is not None:
        fitting = [bucket for bucket in buckets if bucket >= n]
        if not fitting:
            raise ValueError(
                f"bucket_len: {n} tokens are more than the largest bucket of {list(buckets)}; add a larger"
            )
        return min(fitting)
    if n <= 128:
        return -(-n // 32) * 32
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power


def pack_rows(
    lengths: Sequence[int] | np.ndarray, row_len: int, *, num_rows: int | None = None, num_shards: int = 1
) -> PackPlan:
    """Plan by best-fit decreasing, with equal contiguous blocks of rows (one per shard) balanced in tokens.

    Gives `num_rows` rows, by default the fewest that `num_shards` divides; rows left over are empty. The blocks'
    tokens differ by no more than the fullest row. Raises ValueError for a length outside [1, row_len], too few rows,
    or rows that do not divide.
    """
    lengths = tuple(int(length) for length in lengths)
    packed = fit_rows(lengths, row_len)
    if num_rows is None:
        num_rows = -(-len(packed) // num_shards) * num_shards
    if num_rows < len(packed):
        raise ValueError(
            f"packing: {len(lengths)} sequences fill {len(packed)} rows of {row_len}; found {num_rows} rows"
        )
    if num_rows % num_shards:
        raise ValueError(
            f"packing: {num_rows} rows do not divide over {num_shards} shards; use a multiple of {num_shards}"
        )
    packed += [()] * (num_rows - len(packed))
    return PackPlan(row_len=row_len, rows=_balance(packed, lengths, num_shards), lengths=lengths)


def count_rows(lengths: np.ndarray, row_len: int) -> tuple[int, int]:
    """Returns how many rows `pack_rows` fills, and the sequences of the fullest, without the plan itself."""
    rows = fit_rows(lengths, row_len)
    return len(rows), max(map(len, rows), default=0)


def fit_rows(lengths: Sequence[int] | np.ndarray, row_len: int) -> list[tuple[int, ...]]:
    """Returns the sequences of each row, by best-fit decreasing; ValueError for a length outside [1, row_len]."""
    lengths = np.asarray(lengths, np.int64)
    rows: list[list[int]] = []
    sizes: list[int] = lengths.tolist()
    spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted, so the tightest fit is found by bisection
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = sizes[index]
        if not 1 <= length <= row_len:
            raise ValueError(
                f"packing: sequence {index} has {length} tokens; needed 1 to {row_len}, the row length: "
                "truncate the sequences or use longer rows"
            )
        place = bisect_left(spaces, (length, 0))
        if place < len(spaces):
            free, row = spaces.pop(place)
        else:
            free, row = row_len, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > length:
            insort(spaces, (free - length, row))
    return [tuple(row) for row in rows]


def _balance(rows: list[tuple[int, ...]], lengths: tuple[int, ...], num_shards: int) -> tuple[tuple[int, ...], ...]:
    # Dealt from the fullest row down, turning round after each deal so that no block is always served first.
    ordered = sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
    blocks: list[list[tuple[int, ...]]] = [[] for _ in range(num_shards)]
    for start in range(0, len(ordered), num_shards):
        deal = ordered[start : start + num_shards]
        for block, row in zip(blocks if start // num_shards % 2 == 0 else reversed(blocks), deal, strict=True):
            block.append(row)
    return tuple(row for block in blocks for row in block)


def pack(
    examples: Sequence[dict[str, np.ndarray]],
    plan: PackPlan,
    num_rows: int | None = None,
    num_segments: int | None = None,
) -> Batch:
    """Batch of `num_rows` rows (default: the plan's) with every key of the examples, `segment_ids` and `positions`.

    Of a key with dim `time` an example has [L, ...], which becomes [R, T, ...]; of any other it has what becomes its
    place in [R, S, ...]. Padding is 0 or False. Rows beyond the plan's come last: a plan balanced over shards should
    have them itself. An example with the key `part_lens` [P] holds P sequences one after the other, each a segment of
    its own; of a key with dim `segments` it has [P] then. Raises ValueError where the examples do not match each other,
    their keys' dims or the plan, or do not fit.
    """
    num_rows = len(plan.rows) if num_rows is None else num_rows
    num_segments = plan.num_segments if num_segments is None else num_segments
    if len(examples) != len(plan.lengths) or not examples:
        raise ValueError(f"packing: found {len(examples)} examples for a plan of {len(plan.lengths)}; needed as many")
    if num_rows < len(plan.rows) or num_segments < plan.num_segments:
        raise ValueError(
            f"packing: found {num_rows} rows of {num_segments} segments; needed at least {len(plan.rows)} rows of "
            f"{plan.num_segments} segments"
        )
    _check_examples(examples, plan)
    num_parts, arrays = len(examples[0].get(PART_LENS, [0])), {}
    for key, value in examples[0].items():
        if key == PART_LENS:
            continue
        shape = (plan.row_len, *np.shape(value)[1:]) if is_per_token(key) else (num_segments, *np.shape(value))
        if is_per_segment(key):
            shape = (num_segments * num_parts,)
        arrays[key] = np.zeros((num_rows, *shape), value.dtype)
    segment_ids = np.zeros((num_rows, plan.row_len), np.int32)
    positions = np.zeros((num_rows, plan.row_len), np.int32)
    for index, row, segment, tokens in plan.places():
        parts = examples[index].get(PART_LENS, [plan.lengths[index]])
        segment_ids[row, tokens] = np.repeat(segment * len(parts) + 1 + np.arange(len(parts)), parts)
        positions[row, tokens] = np.concatenate([np.arange(length) for length in parts])
        segments = slice(segment * len(parts), (segment + 1) * len(parts))
        for key, array in arrays.items():
            place = tokens if is_per_token(key) else segments if is_per_segment(key) else segment
            array[row, place] = examples[index][key]
    return Batch.of(segment_ids=segment_ids, positions=positions).with_arrays(**arrays)


def unpack(batch: Batch) -> list[dict[str, np.ndarray]]:
    """The sequences of a packed batch of host arrays, row by row from the left; the inverse of `pack`.

    [L, ...] of each per-token array, 0-d of each [R, S] one. What follows from the packing is left out:
    `segment_ids`, `positions` and `targets`.
    """
    arrays = {key: np.asarray(batch[key]) for key in batch if key not in ("segment_ids", "positions", "targets")}
    return [
        {key: array[row, tokens if is_per_token(key) else segment] for key, array in arrays.items()}
        for row, segment, tokens in segment_slices(np.asarray(batch["segment_ids"]))
    ]


def rollout_row_len(longest: int, num_sequences: int, row_multiple: int) -> int:
    """Row length for `num_sequences` sequences of unknown lengths up to `longest`: one to eight times its bucket.

    Long rows pack tightly, but a batch needs a multiple of `row_multiple` of them also where sequences turn out short,
    and with few rows one more or less is much.
    """
    return bucket_len(longest) * min(8, max(1, num_sequences // (16 * row_multiple)))


def bucket_rows(num_rows: int, row_multiple: int) -> int:
    """Smallest number of rows >= num_rows of row_multiple * (1 to 8, 10, 12, 14, 16, 20, 24, ...): few shapes, little
    padding.
    """
    groups = max(1, -(-num_rows // row_multiple))
    step = 1 << max(0, groups.bit_length() - 3)
    return -(-groups // step) * step * row_multiple


def target_indices(mask: np.ndarray, positions: np.ndarray, num_targets: int) -> np.ndarray | None:
    """Returns the row indices `[R, P]` of the tokens of a mask `[R, T]`, T in empty places; None where P would be T.

    P is `num_targets`, no less than those of any row. A sequence's first token has no log-probability.
    """
    num_rows, row_len = mask.shape
    if num_targets >= row_len:
        return None
    is_target = mask & (positions > 0)
    targets = np.full((num_rows, num_targets), row_len, np.int32)
    targets[np.arange(num_targets) < is_target.sum(axis=1)[:, None]] = np.nonzero(is_target)[1]
    return targets


def _check_examples(examples: Sequence[dict[str, np.ndarray]], plan: PackPlan) -> None:
    for index, (example, length) in enumerate(zip(examples, plan.lengths, strict=True)):
        if example.keys() != examples[0].keys():
            raise ValueError(f"packing: example {index} has keys {sorted(example)}, the first {sorted(examples[0])}")
        if PART_LENS in example and sum(example[PART_LENS]) != length:
            raise ValueError(f"packing: the parts of example {index} add up to {sum(example[PART_LENS])}, not {length}")
        for key, value in example.items():
            if key == PART_LENS:
                continue
            shape, names = np.shape(value), find_dims(key)
            if is_per_token(key) and (len(shape) != len(names) - 1 or shape[0] != length):
                raise ValueError(f"packing: {key!r} of example {index} has shape {shape}; needed {length} tokens")
            of_parts = np.shape(example[PART_LENS]) if PART_LENS in example and is_per_segment(key) else None
            if not is_per_token(key) and (len(shape) != len(names) - 2 if of_parts is None else shape != of_parts):
                needed = "one for the example" if of_parts is None else "one for each of its sequences"
                raise ValueError(f"packing: {key!r} of example {index} has shape {shape}; needed {needed}")
