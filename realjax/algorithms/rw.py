"""Reward modelling: the better answer of a pair should score higher (Bradley-Terry, arXiv:2203.02155 eq. 1)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from realjax.algorithms.pairs import score_metrics, sum_by_pair
from realjax.core.batch import Batch
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean
from realjax.core.segments import last_token_mask


def reward_loss(outputs: Mapping[str, Array], batch: Batch) -> LossSums:
    """Returns -log sigmoid(better - worse) summed with `pair_weight` `[R, P]`; its weight is the number of prompts.

    A sequence's score is the scalar head's output at its last token. Weights of a prompt's pairs add up to 1, so that a
    prompt counts once however many pairs it has.
    """
    weights, segment_ids = batch["pair_weight"], batch["segment_ids"]
    scores = jnp.where(last_token_mask(segment_ids), outputs["values"], 0)
    better, worse = sum_by_pair(scores, segment_ids, weights.shape[1])
    loss = Mean(-jnp.sum(weights * jax.nn.log_sigmoid(better - worse)), jnp.sum(weights))
    return LossSums(loss=loss, metrics=score_metrics(better, worse, weights > 0))


REWARD_LOSS = Loss(head="values", fn=reward_loss)
