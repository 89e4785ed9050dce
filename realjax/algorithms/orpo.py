"""ORPO (arXiv:2403.07691): supervised fine-tuning on the better answers, and an odds ratio; without a reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from realjax.algorithms.pairs import mean_by_pair, mean_over_pairs, score_metrics
from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.loss import Loss, LossSums
from realjax.core.option import check_ranges, option

# The least distance of a mean log-probability from 0: at 0 odds have no end.
LEAST = 1e-6


@dataclass(frozen=True, kw_only=True)
class ORPOParameters:
    """ORPO's parameters. Raises ValueError for values outside their range."""

    odds_weight: float = option(0.1, "weight of the odds ratio beside the loss of fine-tuning, lambda", above=0)

    def __post_init__(self) -> None:
        check_ranges(self)


def orpo_loss(outputs: Mapping[str, Array], batch: Batch, *, parameters: ORPOParameters) -> LossSums:
    """Returns -mean log p(better) - lambda log sigmoid(log odds(better) - log odds(worse)), summed over pairs
    (eq. 6 and 7).

    odds(p) = p / (1 - p), p the geometric mean of the probabilities of an answer's tokens. Reads `loss_mask` `[R, T]`
    and `pair_weight` `[R, P]`.
    """
    is_pair = batch["pair_weight"] > 0
    means = mean_by_pair(outputs["logprobs"], batch["loss_mask"], batch["segment_ids"], is_pair.shape[1])
    better, worse = (_log_odds(mean) for mean in means)
    odds_loss = -jax.nn.log_sigmoid(better - worse)
    losses = -means[0] + parameters.odds_weight * odds_loss
    metrics = {
        **score_metrics(better, worse, is_pair),
        "nll": mean_over_pairs(-means[0], is_pair),
        "odds_loss": mean_over_pairs(odds_loss, is_pair),
    }
    return LossSums(loss=mean_over_pairs(losses, is_pair), metrics=metrics)


def _log_odds(logprobs: Array) -> Array:
    bounded = jnp.minimum(logprobs, -LEAST)
    return bounded - jnp.log(-jnp.expm1(bounded))


def make_orpo_loss(parameters: ORPOParameters, draw: Draw = Draw()) -> Loss:  # noqa: B008 - frozen
    """Returns the loss that these parameters describe, of log-probabilities under `draw`."""
    return Loss(head="logprobs", fn=partial(orpo_loss, parameters=parameters), draw=draw)
