"""Per-sequence sums of packed pairs: segments 1, 3, 5, ... of a row are better answers, 2, 4, 6, ... the worse."""

import jax.numpy as jnp
from jax import Array

from realjax.algorithms.masked import sum_by_segment


def sum_by_pair(values_RT: Array, segment_ids: Array, num_pairs: int) -> tuple[Array, Array]:
    """Returns the sums `[R, P]` over each pair's better and over its worse sequence, P = num_pairs."""
    sums = sum_by_segment(values_RT, segment_ids, 2 * num_pairs)
    return sums[:, 0::2], sums[:, 1::2]


def last_token_mask(segment_ids: Array) -> Array:
    """Returns the mask `[R, T]`, True at the last token of every sequence."""
    following = jnp.pad(segment_ids, ((0, 0), (0, 1)))[:, 1:]
    return (segment_ids != following) & (segment_ids > 0)
