"""Where the responses of packed rows lie, in host memory."""

from dataclasses import dataclass

import numpy as np

from realjax.core.host_call import Arrays
from realjax.core.segments import segment_mask, spread_to_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses:
    """Where the responses of packed rows lie. Sequence s of a row has column s of `[R, S]` and segment id s + 1."""

    mask: np.ndarray  # [R, T] response tokens
    segment_ids: np.ndarray  # [R, T]
    exists: np.ndarray  # [R, S] sequences; columns beyond a row's last are False
    last: np.ndarray  # [R, S] index of the last response token; -1 where the response is empty
    lens: np.ndarray  # [R, S] response tokens

    @classmethod
    def of(cls, arrays: Arrays) -> "Responses":
        """Returns the responses of a rollout, from its `segment_ids`, `loss_mask` and (for S) `has_eos`; without those
        of `is_failed`, where it has that key.
        """
        segment_ids = arrays["segment_ids"]
        exists = segment_mask(segment_ids, arrays["has_eos"].shape[1])
        responses = cls._make(arrays["loss_mask"].astype(bool) & (segment_ids > 0), segment_ids, exists)
        is_failed = arrays.get("is_failed")
        return responses if is_failed is None or not is_failed.any() else responses.only(~is_failed.astype(bool))

    @classmethod
    def _make(cls, mask: np.ndarray, segment_ids: np.ndarray, exists: np.ndarray) -> "Responses":
        rows, times = np.nonzero(mask)
        last = np.full(exists.shape, -1)
        np.maximum.at(last, (rows, segment_ids[rows, times] - 1), times)
        lens = sum_at(mask, mask, segment_ids, exists.shape)
        return cls(mask=mask, segment_ids=segment_ids, exists=exists, last=last, lens=lens.astype(np.int64))

    def only(self, sequences_RS: np.ndarray) -> "Responses":
        """Returns the responses of these sequences; the others' tokens become like prompts."""
        return self._make(self.mask & (self.spread(sequences_RS) > 0), self.segment_ids, self.exists & sequences_RS)

    def select(self, values: np.ndarray) -> np.ndarray:
        """Returns float64 `values` `[R, T]`, 0 off the responses; what stands there, nan included, is not looked at."""
        return np.where(self.mask, values, 0).astype(np.float64)

    def spread(self, values_RS: np.ndarray) -> np.ndarray:
        """Returns `[R, T]`: each token has its sequence's value, padding 0."""
        return spread_to_tokens(values_RS, self.segment_ids)

    def place_last(self, values_RS: np.ndarray) -> np.ndarray:
        """Returns `[R, T]`: each response's last token has its sequence's value, every other token 0."""
        placed = np.zeros(self.mask.shape)
        rows, columns = np.nonzero(self.lens)
        placed[rows, self.last[rows, columns]] = values_RS[rows, columns]
        return placed

    def sum(self, values_RT: np.ndarray) -> np.ndarray:
        """Returns the sums `[R, S]` over each response."""
        return sum_at(values_RT, self.mask, self.segment_ids, self.exists.shape)

    def tokens_left(self) -> np.ndarray:
        """Returns `[R, T]`: how many tokens of its response follow each response token; 0 elsewhere."""
        counts = np.cumsum(self.mask, axis=1)
        at_last = np.take_along_axis(counts, np.maximum(self.last, 0), axis=1)
        return np.where(self.mask, self.spread(at_last) - counts, 0)

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return int(self.lens.sum())

    @property
    def num_seqs(self) -> int:
        """Sequences, those with an empty response counted."""
        return int(self.exists.sum())


def sum_at(values_RT: np.ndarray, mask: np.ndarray, segment_ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the sums `[R, S]`, of this shape, over the masked tokens of each sequence."""
    sums = np.zeros(shape)
    rows, times = np.nonzero(mask)
    np.add.at(sums, (rows, segment_ids[rows, times] - 1), values_RT[rows, times])
    return sums
