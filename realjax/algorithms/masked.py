"""Sums over the sequences of packed rows, and moves along them."""

from typing import Any

import jax
from jax import Array


def sum_by_segment(values_RT: Array, segment_ids: Array, num_segments: int) -> Array:
    """Returns the sums `[R, S]` of each segment's entries, S = num_segments; padding (segment 0) is left out."""

    def one_row(values: Array, segments: Array) -> Array:
        return jax.ops.segment_sum(values, segments, num_segments + 1)[1:]

    return jax.vmap(one_row)(values_RT, segment_ids)


def move_to_next(values_RT: Any, segment_ids: Any) -> Any:
    """Moves entries onto the following token of their sequence, 0 at its first token and on padding; NumPy or JAX.

    What a critic says after reading token t becomes the value before token t + 1.
    """
    namespace = values_RT.__array_namespace__()
    has_previous = (segment_ids == namespace.roll(segment_ids, 1, axis=1)) & (segment_ids > 0)
    has_previous &= namespace.arange(segment_ids.shape[1]) > 0
    return namespace.where(has_previous, namespace.roll(values_RT, 1, axis=1), 0)
