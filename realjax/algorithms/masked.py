"""Sums over the sequences of packed rows."""

import jax
from jax import Array


def sum_by_segment(values_RT: Array, segment_ids: Array, num_segments: int) -> Array:
    """Returns the sums `[R, S]` of each segment's entries, S = num_segments; padding (segment 0) is left out."""

    def one_row(values: Array, segments: Array) -> Array:
        return jax.ops.segment_sum(values, segments, num_segments + 1)[1:]

    return jax.vmap(one_row)(values_RT, segment_ids)
