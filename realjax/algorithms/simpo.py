"""SimPO (arXiv:2405.14734): a pair's answers compared by their mean log-probabilities, without a reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
from jax import Array

from realjax.algorithms.pairs import mean_by_pair, mean_over_pairs, score_metrics
from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.loss import Loss, LossSums
from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class SimPOParameters:
    """SimPO's parameters. Raises ValueError for values outside their range."""

    beta: float = option(2.0, "scale of the mean log-probabilities", above=0)
    gamma: float = option(1.0, "margin by which the better answer's score is to be the higher", at_least=0)

    def __post_init__(self) -> None:
        check_ranges(self)


def simpo_loss(outputs: Mapping[str, Array], batch: Batch, *, parameters: SimPOParameters) -> LossSums:
    """Returns -log sigmoid(better - worse - gamma) summed over pairs (eq. 6), a score being beta times the mean
    log-probability of an answer's tokens.

    Reads `loss_mask` `[R, T]` and `pair_weight` `[R, P]`.
    """
    is_pair = batch["pair_weight"] > 0
    means = mean_by_pair(outputs["logprobs"], batch["loss_mask"], batch["segment_ids"], is_pair.shape[1])
    better, worse = parameters.beta * means[0], parameters.beta * means[1]
    losses = -jax.nn.log_sigmoid(better - worse - parameters.gamma)
    return LossSums(loss=mean_over_pairs(losses, is_pair), metrics=score_metrics(better, worse, is_pair))


def make_simpo_loss(parameters: SimPOParameters, draw: Draw = Draw()) -> Loss:  # noqa: B008 - frozen
    """Returns the loss that these parameters describe, of log-probabilities under `draw`."""
    return Loss(head="logprobs", fn=partial(simpo_loss, parameters=parameters), draw=draw)
