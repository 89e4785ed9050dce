"""Examples of two sequences, such as both answers of a pair."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from realjax.core.identity import digest
from realjax.data.datasets import Ids, digest_ids
from realjax.data.packing import PART_LENS
from realjax.data.sequences import TokenSequence
from realjax.data.store import Writer


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoSequences:
    """N examples of two sequences each, which are always in one row; an answer starts at its place in a sequence.

    Sequences are flat: example i is sequences 2i and 2i+1, sequence s `tokens[offsets[s]:offsets[s+1]]`.
    """

    ids: Ids
    tokens: np.ndarray  # int32
    offsets: np.ndarray  # int64 [2N+1]
    answer_starts: np.ndarray  # int32 [N, 2]
    known_fingerprint: str | None = None  # of all that they were made of

    def __len__(self) -> int:
        return len(self.answer_starts)

    @property
    def fingerprint(self) -> str:
        """A text that changes with the ids, tokens or answers' places."""
        return self.known_fingerprint or digest(digest_ids(self.ids), self.tokens, self.offsets, self.answer_starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both sequences of each example, int32 [N]."""
        return np.diff(self.offsets[::2]).astype(np.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self.offsets).max())

    @property
    def num_targets(self) -> np.ndarray:
        """Tokens of both answers of each example, int32 [N]."""
        of_each = np.diff(self.offsets).reshape(-1, 2) - np.maximum(self.answer_starts, 1)
        return np.maximum(of_each, 0).sum(axis=1).astype(np.int32)

    def take_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of both sequences of an example, int32 [L]."""
        start, middle, end = self.offsets[2 * index : 2 * index + 3]
        return self.tokens[start:middle], self.tokens[middle:end]

    def take_both(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` and `loss_mask` (True at answer tokens and EOS) of both sequences of an example, and their lengths.

        A sequence's first token is predicted from nothing, so it is never learned.
        """
        both, starts = self.take_pair(index), self.answer_starts[index]
        masks = [np.arange(len(tokens)) >= max(start, 1) for tokens, start in zip(both, starts, strict=True)]
        lens = np.array([len(tokens) for tokens in both])
        return {"tokens": np.concatenate(both), "loss_mask": np.concatenate(masks), PART_LENS: lens}


def write_answers(sequences: Sequence[TokenSequence], writer: Writer) -> None:
    """Adds sequences, two for each example, to the arrays that `TwoSequences` is made of."""
    writer.append("tokens", np.concatenate([sequence.tokens for sequence in sequences]))
    writer.append("lengths", np.array([len(sequence.tokens) for sequence in sequences], np.int32))
    writer.append("answer_starts", np.array([sequence.answer_start for sequence in sequences], np.int32))
