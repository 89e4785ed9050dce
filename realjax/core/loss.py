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


# fn(log p, log q) of arrays of one shape -> the terms of a divergence of q, the model's own, from p, a teacher's: their
# sum over outcomes is the divergence. Finite, with a finite gradient, where both arguments are 0.
CompareFn = Callable[[Array, Array], Array]
# What heads give, in the order of an inference call's keys.
HEAD_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "logprobs": ("logprobs",),
    "values": ("values",),
    "choices": ("ids", "choices"),
}


@dataclass(frozen=True)
class Readout:
    """What is read out of a model for each token, float32 and aligned with the token it speaks of.

    head `nll`: outputs `nll` (scalar, differentiable) = -sum(loss_mask * logprobs) and `logprobs` (no gradient).
    head `logprobs`: outputs `logprobs` under `draw` and, if asked for, `entropy` and `divergence`, all differentiable.
    head `choices`: outputs `choices` `[R, T, K + 1]`, the log-probabilities under `draw` of the K likeliest tokens, the
    likeliest first, and of all others together; and the tokens' `ids`, for the others `models.heads.OTHERS`.
    head `values`: outputs `values`, differentiable.
    """

    head: str
    draw: Draw = Draw()
    needs_entropy: bool = False
    num_choices: int | None = None  # K
    # Of the divergence from the batch's `teacher_ids` and `teacher_logprobs`, which are another model's choices.
    compare_fn: CompareFn | None = None


@dataclass(frozen=True)
class Loss:
    """An algorithm's loss, and the model outputs `[R, T]` that it reads, see `Readout`."""

    head: Literal["nll", "logprobs", "values"]
    fn: Callable[[Mapping[str, Array], Batch], LossSums]
    draw: Draw = Draw()  # the distribution whose log-probabilities the head `logprobs` gives
    needs_entropy: bool = False
    skip_fn: Callable[[Mapping[str, Array]], Array] | None = None  # finalised metrics -> skip this update
    compare_fn: CompareFn | None = None

    @property
    def readout(self) -> Readout:
        """What it reads."""
        return Readout(self.head, self.draw, self.needs_entropy, compare_fn=self.compare_fn)
