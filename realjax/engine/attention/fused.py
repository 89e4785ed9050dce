"""JAX's own attention, by XLA, under our masks."""

import jax
import jax.numpy as jnp
from jax import Array

from realjax.engine.attention.reference import cache_mask, packed_mask
from realjax.models.attention import Scoring


def fused_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    scoring: Scoring,
    sinks: Array | None = None,
    max_segment_len: int | None = None,
) -> Array:
    """Packed rows; one `[T, T]` matrix of scores per row and head."""
    mask = packed_mask(segment_ids, segment_ids, 0, scoring.window)
    return _attend(q, k, v, mask[:, None], scoring, sinks)


def fused_decoding(
    q_BNH: Array, k_BKHS: Array, v_BKSH: Array, lengths: Array, scoring: Scoring, sinks: Array | None = None
) -> Array:
    """One query a row by XLA, which wants the heads inside: the cache is transposed for it."""
    k, v = jnp.einsum("BKHS->BSKH", k_BKHS), jnp.einsum("BKSH->BSKH", v_BKSH)
    mask = cache_mask(lengths, k.shape[1], scoring.window)[:, None, None]
    return _attend(q_BNH[:, None], k, v, mask, scoring, sinks)[:, 0]


def _attend(q: Array, k: Array, v: Array, mask: Array, scoring: Scoring, sinks: Array | None) -> Array:
    bias = None
    if sinks is not None:
        # One key more, of zeros: its score is the bias alone, and its value adds nothing.
        k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)
        bias = jnp.pad(sinks[None, :, None, None], ((0, 0), (0, 0), (0, 0), (k.shape[1] - 1, 0)))
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scoring.scale, implementation="xla")
