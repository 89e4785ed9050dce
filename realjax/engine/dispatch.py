"""Tokens sent to those devices alone that have experts of theirs: a copy to each, and its part of the sum back.

Where devices share experts, a token's k are on fewer of them than there are, or a device has several of the k.
"""

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from realjax.engine.manual_axes import find_share, gather_shares, send_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dispatch:
    """Where n tokens of a device go among P that share experts, and what comes."""

    sources: Array  # [S] the token of each copy that is sent, in the order of their destinations; n where there is none
    copies: Array  # [n, P] the number of a token's copy for each destination; S where it sends none
    sizes: Array  # [P, P] copies from each device to each

    def spread(self, x: Array) -> Array:
        """Returns the tokens that come `[P * n, ...]` of this device's `x` `[n, ...]`, those of a device one after
        another; behind all of them 0.
        """
        return cast(Array, _spread(x, self))

    def collect(self, y: Array) -> Array:
        """Returns the sums `[n, ...]`, made in float32, of what the destinations of each token have for it."""
        return cast(Array, _collect(y, self))


def find_dispatch(ids: Array, num_own: int) -> Dispatch:
    """Returns the dispatch of tokens with experts of these numbers `[n, k]`; devices have `num_own` experts each."""
    (_, num_parts), (num_tokens, num_chosen) = find_share(), ids.shape
    goes = jnp.any(ids[:, :, None] // num_own == jnp.arange(num_parts), axis=1)
    in_order, most = goes.T.reshape(-1), num_tokens * min(num_chosen, num_parts)
    found = jnp.nonzero(in_order, size=most, fill_value=in_order.size)[0]
    numbers = (jnp.cumsum(in_order) - 1).reshape(num_parts, num_tokens).T
    return Dispatch(
        sources=jnp.where(found < in_order.size, found % num_tokens, num_tokens),
        copies=jnp.where(goes, numbers, most),
        sizes=gather_shares(jnp.sum(goes, axis=0, dtype=jnp.int32)),
    )


@jax.custom_vjp
def _spread(x: Array, dispatch: Dispatch) -> Array:
    part, num_parts = find_share()
    own, places = dispatch.sizes[part], _starts(dispatch.sizes, 0)[part]
    sent = x.at[dispatch.sources].get(mode="fill", fill_value=0)
    return send_rows(sent, num_parts * len(x), _starts(own, 0), own, places, dispatch.sizes[:, part])


@jax.custom_vjp
def _collect(y: Array, dispatch: Dispatch) -> Array:
    part, _ = find_share()
    came, places = dispatch.sizes[:, part], _starts(dispatch.sizes, 1)[:, part]
    back = send_rows(y, len(dispatch.sources), _starts(came, 0), came, places, dispatch.sizes[part])
    parts = back.at[dispatch.copies].get(mode="fill", fill_value=0)
    return parts.sum(axis=1, dtype=jnp.float32).astype(y.dtype)


# Each is the other's transpose.
_spread.defvjp(
    lambda x, dispatch: (_spread(x, dispatch), dispatch), lambda dispatch, grad: (_collect(grad, dispatch), None)
)
_collect.defvjp(
    lambda y, dispatch: (_collect(y, dispatch), dispatch), lambda dispatch, grad: (_spread(grad, dispatch), None)
)


def _starts(sizes: Array, dim: int) -> Array:
    """Returns where parts of these sizes start that lie one after another."""
    return jnp.cumsum(sizes, axis=dim, dtype=jnp.int32) - sizes
