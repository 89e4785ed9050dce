"""Answers that a reward could not score: why, told once for each source; how many, counted by the mix of rewards."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from realjax.core.named import shorten

logger = logging.getLogger("realjax.rewards")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An answer without a reward: which it is, and what happened."""

    answer: str
    row: str  # of the data
    reason: str


class Failures:
    """What the sources of a run's rewards could not score."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def tell(self, source: str, failures: Sequence[Failure]) -> None:
        """Says what happened to the first answer that a source could not score; of later ones nothing."""
        if not failures or source in self._first:
            return
        first = failures[0]
        self._first[source] = f"{source}: {first.reason}, for the answer {shorten(first.answer)} to {first.row}"
        logger.warning("%s; nothing is learned from it, and reward/failed counts all such answers", self._first[source])

    def __str__(self) -> str:
        """The first failure of each source; nothing where the sources are another process's."""
        return "; ".join(self._first.values())
