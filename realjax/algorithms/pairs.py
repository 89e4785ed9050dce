"""Per-sequence sums of packed pairs: segments 1, 3, 5, ... of a row are better answers, 2, 4, 6, ... the worse."""

import jax.numpy as jnp
from jax import Array

from realjax.core.loss import Sums
from realjax.core.metrics import Mean, Total
from realjax.core.segments import sum_by_segment


def sum_by_pair(values_RT: Array, segment_ids: Array, num_pairs: int) -> tuple[Array, Array]:
    """Returns the sums `[R, P]` over each pair's better and over its worse sequence, P = num_pairs."""
    sums = sum_by_segment(values_RT, segment_ids, 2 * num_pairs)
    return sums[:, 0::2], sums[:, 1::2]


def mean_by_pair(values_RT: Array, mask: Array, segment_ids: Array, num_pairs: int) -> tuple[Array, Array]:
    """Returns the means `[R, P]` over the masked tokens of each pair's better and worse sequence, 0 without any."""
    sums = sum_by_pair(jnp.where(mask, values_RT, 0), segment_ids, num_pairs)
    counts = sum_by_pair(mask.astype(jnp.float32), segment_ids, num_pairs)
    return sums[0] / jnp.maximum(counts[0], 1), sums[1] / jnp.maximum(counts[1], 1)


def mean_over_pairs(values_RP: Array, is_pair: Array) -> Mean:
    """Returns the mean over the pairs that there are."""
    return Mean(jnp.sum(jnp.where(is_pair, values_RP, 0)), jnp.sum(is_pair.astype(jnp.float32)))


def score_metrics(better: Array, worse: Array, is_pair: Array) -> Sums:
    """Returns what is to be known of the scores `[R, P]` of both answers."""
    values = {"acc": better > worse, "pos_score": better, "neg_score": worse, "margin": better - worse}
    means = {name: mean_over_pairs(x, is_pair) for name, x in values.items()}
    return {**means, "n_pairs": Total(means["margin"].weight)}
