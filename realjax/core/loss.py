"""What a loss function returns: sums and weights, so that nothing depends on how a batch was split."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
from jax import Array

from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.metrics import Load, Mean, Total

# Of a loss and of the layers: parts add up, entry by entry.
Sums = dict[str, Mean | Total | Load]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """The loss summed over its units (tokens, pairs, ...), the number of units, and metrics to report beside it.

    The number of units depends on the batch alone: it is asked for before there are outputs.
    """

    loss: Mean
    metrics: Sums

    def with_terms(self, terms: Mapping[str, Mean | Load], shares: Mapping[str, Array]) -> "LossSums":
        """Returns the sums with terms of the layers: reported by name, and added to the loss where one has a share."""
        total = self.loss.sum
        for name, share in shares.items():
            total += share * terms[name].sum  # pyright: ignore - counts have no share
        return LossSums(Mean(total, self.loss.weight), {**self.metrics, **terms})


@dataclass(frozen=True)
class Loss:
    """An algorithm's loss and the model outputs it reads, all `[R, T]` float32 and aligned with their token.

    head `nll`: outputs `nll` (scalar, differentiable) = -sum(loss_mask * logprobs) and `logprobs` (no gradient).
    head `logprobs`: outputs `logprobs` under `draw` and, if needed, `entropy`, both differentiable.
    head `values`: outputs `values`, differentiable.
    """

    head: Literal["nll", "logprobs", "values"]
    fn: Callable[[Mapping[str, Array], Batch], LossSums]
    draw: Draw = Draw()  # the distribution whose log-probabilities the head `logprobs` gives
    needs_entropy: bool = False
    skip_fn: Callable[[Mapping[str, Array]], Array] | None = None  # finalised metrics -> skip this update
