"""Rows dealt out to parts of a batch, such as micro-batches, and put back."""

from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def deal_rows(tree: T, num_parts: int) -> T:
    """Returns arrays `[num_parts, R/num_parts, ...]` of `[R, ...]`. Dealt in turn, each row stays on its own device."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, num_parts, *x.shape[1:]), 1, 0), tree)


def join_rows(parts: T) -> T:
    """Returns arrays `[R, ...]` of `[num_parts, R/num_parts, ...]`; the inverse of `deal_rows`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
