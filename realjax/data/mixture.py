"""Several datasets as one, each with its share of an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from realjax.core.identity import digest
from realjax.core.json_text import JsonObject
from realjax.data.loader import Dataset
from realjax.data.store import Made


@dataclass(frozen=True, eq=False)
class Chain(Made[Any]):
    """Sequences one after the other, without a copy."""

    parts: tuple[Sequence[Any], ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def make(self, place: int) -> Any:
        for part in self.parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(place)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Datasets as one of all their examples.

    An epoch has as many examples as theirs together. With `weights`, part i gives the share weights[i] / sum(weights)
    of them: each of its examples equally often, but for one time more or less, in orders drawn anew. Without, or in
    order, each example comes once.
    """

    parts: tuple[Dataset, ...]
    weights: tuple[float, ...] = ()

    @property
    def ids(self) -> Chain:
        """The rows' names; two parts may have the same."""
        return Chain(tuple(part.ids for part in self.parts))

    @property
    def rows(self) -> Sequence[JsonObject]:
        """The rows of prompts."""
        return Chain(tuple(getattr(part, "rows") for part in self.parts))  # noqa: B009 - of prompts alone

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def fingerprint(self) -> str:
        """A text that changes with a part, or with a weight."""
        return digest(*(part.fingerprint for part in self.parts), repr(self.weights))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [N]."""
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def num_targets(self) -> np.ndarray | None:
        """Tokens of each example that are learned, int32 [N]; None where the parts do not tell."""
        found = [part.num_targets for part in self.parts]
        return None if any(x is None for x in found) else np.concatenate([x for x in found if x is not None])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(part.longest for part in self.parts)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.parts)])

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Indices of an epoch's examples in order: as many in each epoch."""
        orders = [part.order(seed, epoch, shuffle) for part in self.parts]
        if not shuffle:
            return np.concatenate([order + start for order, start in zip(orders, self._starts, strict=False)])
        rng, total = np.random.default_rng((seed, epoch, len(self.parts))), sum(map(len, orders))
        counts = share_out(total, self.weights) if self.weights else list(map(len, orders))
        drawn = []
        for number, (part, count) in enumerate(zip(self.parts, counts, strict=True)):
            taken = [orders[number]]
            while sum(map(len, taken)) < count:
                # Epochs of the part's own that no other epoch of the run asks for.
                taken.append(part.order(seed, (epoch + 1) * 2**32 + len(taken), shuffle))
            drawn.append(np.concatenate(taken)[:count] + self._starts[number])
        return rng.permutation(np.concatenate(drawn))

    def example(self, index: int) -> dict[str, np.ndarray]:
        """Arrays of one example; a prompt's number is its number among those of all parts."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        start = int(self._starts[number])
        example = self.parts[number].example(index - start)
        if "prompt_id" in example:
            example = {**example, "prompt_id": (example["prompt_id"] + start).astype(np.int32)}
        return example


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Returns whole numbers in proportion to the weights that add up to `total`."""
    ends = np.round(np.cumsum(weights) / np.sum(weights) * total).astype(int)
    return np.diff(ends, prepend=0).tolist()
