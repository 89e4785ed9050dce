"""Sizes of arrays that follow from drawn lengths: few in a run, since each is a compilation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from realjax.data.packing import bucket_rows, count_rows

# A size met before is taken again up to so many times what would be enough: beyond that a compilation pays, in a run
# that has shown to be a long one.
MOST_SPARE, MANY_TIMES = 4 / 3, 64


class LeastSizes:
    """The least sizes that serve, rounded up to a few."""

    def rows(self, parts: Sequence[Sequence[int]], row_len: int, multiple: int) -> int:
        """Returns in how many rows of `row_len` tokens, a multiple, each part fits: sequences of such lengths."""
        return bucket_rows(max(count_rows(np.array(lengths), row_len)[0] for lengths in parts), multiple)

    def segments(self, needed: int) -> int:
        """Returns for how many sequences a row has places."""
        return bucket_rows(needed, 4)

    def targets(self, needed: int, row_len: int, most: int) -> int:
        """Returns how many tokens of a row are asked about at most: an eighth of the row or a multiple of it.

        `most`: as many as a row can have that begins with the shortest prompt.
        """
        return _round_targets(needed, row_len)


LEAST = LeastSizes()


@dataclass(frozen=True, kw_only=True)
class CallSizes(LeastSizes):
    """The sizes of what a call makes or reads, chosen among those that it has met.

    One is taken again where it is enough and, later in a run, not far too much. A new one has room for the steps to
    come, whose lengths differ from this one's.
    """

    met: dict[str, list[int]]
    name: str

    def rows(self, parts: Sequence[Sequence[int]], row_len: int, multiple: int) -> int:
        needed = max(count_rows(np.array(lengths), row_len)[0] for lengths in parts)
        # One and a half standard deviations of a sum of such lengths.
        room = 1.5 * max(math.sqrt(len(lengths)) * float(np.std(lengths)) for lengths in parts) / row_len
        round_up = lambda rows: math.ceil(rows / multiple) * multiple
        return self._take(f"rows of {row_len} tokens, times {multiple}", round_up(needed), round_up(needed + room))

    def segments(self, needed: int) -> int:
        return self._take("sequences of a row", super().segments(needed), super().segments(needed + needed // 4))

    def targets(self, needed: int, row_len: int, most: int) -> int:
        with_room = _round_targets(min(needed + row_len / 4, most), row_len)
        return self._take(f"targets of {row_len} tokens", super().targets(needed, row_len, most), with_room)

    def _take(self, what: str, needed: int, with_room: int) -> int:
        met = self.met.setdefault(f"{self.name}: {what}", [])
        times = self.met.setdefault(f"{self.name}: {what}: times", [0])
        times[0] = min(times[0] + 1, MANY_TIMES)
        most = max(MOST_SPARE * needed, with_room) if times[0] == MANY_TIMES else math.inf
        if fitting := [size for size in met if needed <= size <= most]:
            return min(fitting)
        met.append(with_room)
        return with_room


class Sizes:
    """The sizes that a run has met. They are part of its state: by rounding, what a step computes depends on them."""

    def __init__(self, met: Mapping[str, Sequence[int]] | None = None) -> None:
        self.met = {name: list(sizes) for name, sizes in (met or {}).items()}

    def of(self, call: str) -> CallSizes:
        """Returns those of a call."""
        return CallSizes(met=self.met, name=call)


def _round_targets(needed: float, row_len: int) -> int:
    step = -(-row_len // 8)
    return max(1, math.ceil(needed / step)) * step
