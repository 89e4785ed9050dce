"""The k largest numbers of long rows, without sorting the rows."""

import jax
import jax.numpy as jnp
from jax import Array

GROUP = 8


def largest(x_BV: Array, k: int) -> tuple[Array, Array]:
    """Returns what `jax.lax.top_k` does, values and indices `[B, k]`, equal numbers in the order of their indices.

    The k largest are in the k groups of neighbours whose own largest are the largest: groups are chosen by those, in
    the same way, and only what is in them is sorted. With equal numbers the groups' order is that of the indices too.
    """
    B, V = x_BV.shape
    if V // GROUP + GROUP * k > V // 2:
        values, ids = jax.lax.top_k(x_BV, k)
        return values, ids
    groups = jnp.pad(x_BV, ((0, 0), (0, -V % GROUP)), constant_values=-jnp.inf).reshape(B, -1, GROUP)
    chosen = jnp.sort(largest(jnp.max(groups, axis=2), k)[1], axis=1)  # so that places order as indices do
    ids = (chosen[:, :, None] * GROUP + jnp.arange(GROUP)).reshape(B, -1)
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(B, -1)
    values, places = largest(candidates, k)
    return values, jnp.take_along_axis(ids, places, axis=1)
