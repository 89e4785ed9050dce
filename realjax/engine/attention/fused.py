"""JAX's own attention, by XLA, under our masks."""

import jax
import jax.numpy as jnp
from jax import Array

from realjax.engine.attention.reference import cache_mask, packed_mask


def fused_attention(
    q: Array, k: Array, v: Array, segment_ids: Array, window: int | None, max_segment_len: int | None = None
) -> Array:
    """Packed rows; one `[T, T]` matrix of scores per row and head."""
    mask = packed_mask(segment_ids, segment_ids, 0, window)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")


def fused_decoding(q_BNH: Array, k_BKHS: Array, v_BKSH: Array, lengths: Array, window: int | None) -> Array:
    """One query a row by XLA, which wants the heads inside: the cache is transposed for it."""
    k, v = jnp.einsum("BKHS->BSKH", k_BKHS), jnp.einsum("BKSH->BSKH", v_BKSH)
    mask = cache_mask(lengths, k.shape[1], window)[:, None, None]
    return jax.nn.dot_product_attention(q_BNH[:, None], k, v, mask=mask, implementation="xla")[:, 0]
