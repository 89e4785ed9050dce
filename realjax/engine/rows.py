"""Rows dealt out to parts of a batch, such as micro-batches or the devices along `data`, taken and put back."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

T = TypeVar("T")


def deal_rows(tree: T, num_parts: int) -> T:
    """Returns arrays `[num_parts, R/num_parts, ...]` of `[R, ...]`. Dealt in turn, each row stays on its own device."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, num_parts, *x.shape[1:]), 1, 0), tree)


def join_rows(parts: T) -> T:
    """Returns arrays `[R, ...]` of `[num_parts, R/num_parts, ...]`; the inverse of `deal_rows`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def take_rows(tree: T, index: Array, num_parts: int) -> T:
    """Returns the rows `index` `[R]`: each of `num_parts` equal parts of it counts within its own part of the arrays.

    Mapped over the parts, rows stay on the devices that hold them.
    """
    take = jax.vmap(lambda x, i: x[i])
    return jax.tree.map(lambda x: _cat(take(_cut(x, num_parts), _cut(index, num_parts))), tree)


def put_rows(tree: T, rows: T, index: Array, num_parts: int) -> T:
    """Returns the arrays with `rows` `[R, ...]` at `index` `[R]`, counted as in `take_rows`; one beyond its part is
    dropped.
    """
    put = jax.vmap(lambda x, i, new: x.at[i].set(new, mode="drop"))
    return jax.tree.map(lambda x, new: _cat(put(*(_cut(y, num_parts) for y in (x, index, new)))), tree, rows)


def _cut(x: Array, num_parts: int) -> Array:
    return x.reshape(num_parts, -1, *x.shape[1:])


def _cat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])
