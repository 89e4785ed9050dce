"""Examples of two sequences, such as both answers of a pair."""

from dataclasses import dataclass

import numpy as np

from realjax.core.identity import digest
from realjax.data.packing import PART_LENS


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoSequences:
    """N examples of two sequences each, which are always in one row; an answer starts at its place in a sequence."""

    ids: tuple[str | int, ...]
    sequences: tuple[tuple[np.ndarray, np.ndarray], ...]  # tokens int32 of both
    answer_starts: np.ndarray  # int32 [N, 2]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def fingerprint(self) -> str:
        """A text that changes with the ids, tokens or answers' places."""
        tokens = [part for both in self.sequences for part in both]
        sizes = np.array([len(part) for part in tokens], np.int32)
        return digest(repr(self.ids), np.concatenate(tokens), sizes, self.answer_starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both sequences of each example, int32 [N]."""
        return np.array([len(first) + len(second) for first, second in self.sequences], np.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(tokens) for both in self.sequences for tokens in both)

    def take_both(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` and `loss_mask` (True at answer tokens and EOS) of both sequences of an example, and their lengths.

        A sequence's first token is predicted from nothing, so it is never learned.
        """
        both, starts = self.sequences[index], self.answer_starts[index]
        masks = [np.arange(len(tokens)) >= max(start, 1) for tokens, start in zip(both, starts, strict=True)]
        lens = np.array([len(tokens) for tokens in both])
        return {"tokens": np.concatenate(both), "loss_mask": np.concatenate(masks), PART_LENS: lens}
