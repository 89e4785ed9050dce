"""Where the sequences of packed rows begin and end, and what follows from it.

`segment_ids` `[R, T]` are 0 at padding and 1..S from the left. NumPy arrays give NumPy arrays, JAX ones JAX arrays.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import TypeVar

import jax
import numpy as np
from jax import Array

AnyArray = TypeVar("AnyArray", np.ndarray, Array)


def last_token_mask(segment_ids: AnyArray) -> AnyArray:
    """Returns the mask `[R, T]`, True at the last token of every segment."""
    return (segment_ids > 0) & ~_has_neighbour(segment_ids, -1)


def segment_mask(segment_ids: np.ndarray, num_segments: int) -> np.ndarray:
    """Returns the mask `[R, S]`, True where the row has such a segment, S = num_segments."""
    return np.arange(num_segments) < segment_ids.max(axis=1, initial=0)[:, None]


def segment_slices(segment_ids: np.ndarray) -> Iterator[tuple[int, int, slice]]:
    """Yields (row, segment from 0, slice of its tokens), row by row from the left."""
    for row, ids in enumerate(segment_ids):
        edges = np.searchsorted(ids[: np.count_nonzero(ids)], np.arange(1, ids.max(initial=0) + 2))
        for segment, (start, end) in enumerate(pairwise(edges.tolist())):
            yield row, segment, slice(start, end)


def move_to_next(values_RT: AnyArray, segment_ids: AnyArray) -> AnyArray:
    """Moves entries onto the following token of their segment, 0 at its first token and on padding.

    What is said after reading token t becomes what is said of token t + 1. Dims after these two come along.
    """
    namespace = values_RT.__array_namespace__()
    mask = _has_neighbour(segment_ids, 1).reshape(*segment_ids.shape, *[1] * (values_RT.ndim - 2))
    return namespace.where(mask, _move(values_RT, 1), 0)


def move_to_previous(values_RT: AnyArray, segment_ids: AnyArray) -> AnyArray:
    """The adjoint of `move_to_next`: entries of a token move onto the one before it, 0 at the last and on padding."""
    namespace = values_RT.__array_namespace__()
    return namespace.where(_has_neighbour(segment_ids, -1), _move(values_RT, -1), 0)


def _has_neighbour(segment_ids: AnyArray, by: int) -> AnyArray:
    """Returns the mask `[R, T]` of tokens whose segment reaches to the token on the left (1) or on the right (-1)."""
    namespace = segment_ids.__array_namespace__()
    return namespace.logical_and(segment_ids == _move(segment_ids, by), segment_ids > 0)


def _move(x_RT: AnyArray, by: int) -> AnyArray:
    """Returns a row's entries one place to the right (1) or to the left (-1), 0 where none comes in."""
    padding, part = ((1, 0), slice(None, -1)) if by == 1 else ((0, 1), slice(1, None))
    return x_RT.__array_namespace__().pad(x_RT, ((0, 0), padding, *[(0, 0)] * (x_RT.ndim - 2)))[:, part]


def spread_to_tokens(values_RS: AnyArray, segment_ids: AnyArray) -> AnyArray:
    """Returns `[R, T]`: each token has its segment's value, padding 0."""
    namespace = values_RS.__array_namespace__()
    own = namespace.take_along_axis(values_RS, namespace.maximum(segment_ids - 1, 0), axis=1)
    return namespace.where(segment_ids > 0, own, 0)


def sum_by_segment(values_RT: Array, segment_ids: Array, num_segments: int) -> Array:
    """Returns the sums `[R, S]` of each segment's entries, S = num_segments; padding is left out."""

    def one_row(values: Array, segments: Array) -> Array:
        return jax.ops.segment_sum(values, segments, num_segments + 1)[1:]

    return jax.vmap(one_row)(values_RT, segment_ids)
