"""Attention as it is defined: every score at once. The other kernels are tested against these."""

import jax
import jax.numpy as jnp
from jax import Array


def packed_mask(q_segments: Array, k_segments: Array, q_start: int, window: int | None) -> Array:
    """Returns the mask `[R, T, S]`, True where query t (at row index q_start + t) may see key s."""
    t = q_start + jnp.arange(q_segments.shape[1])[:, None]
    s = jnp.arange(k_segments.shape[1])[None, :]
    near = s <= t if window is None else (s <= t) & (s > t - window)
    return (q_segments[:, :, None] == k_segments[:, None, :]) & near


def masked_attention(q_RTNH: Array, k_RSKH: Array, v_RSKH: Array, mask_RTS: Array) -> Array:
    """Returns softmax(q k^T / sqrt(H)) v over the allowed keys, grouped heads, softmax in float32: `[R, T, N, H]`."""
    R, T, N, H = q_RTNH.shape
    K = k_RSKH.shape[2]
    q = (q_RTNH * H**-0.5).reshape(R, T, K, N // K, H)
    scores = jnp.einsum("RTKGH,RSKH->RKGTS", q, k_RSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_RTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_RSKH.dtype)
    return jnp.einsum("RKGTS,RSKH->RTKGH", probs, v_RSKH).reshape(R, T, N, H)


def dense_attention(
    q: Array, k: Array, v: Array, segment_ids: Array, window: int | None, max_segment_len: int | None = None
) -> Array:
    """One `[T, T]` matrix of scores per row and head."""
    return masked_attention(q, k, v, packed_mask(segment_ids, segment_ids, 0, window))


def cache_mask(lengths: Array, cache_len: int, window: int | None) -> Array:
    """Returns the mask `[B, S]`, True where the token at index `lengths` `[B]` of its row may see index s."""
    index = jnp.arange(cache_len)[None]
    mask = index <= lengths[:, None]
    return mask if window is None else mask & (index > lengths[:, None] - window)


def dense_decoding(q_BNH: Array, k_BKHS: Array, v_BKSH: Array, lengths: Array, window: int | None) -> Array:
    """One row of scores per query, against the cache as it lies."""
    B, N, H = q_BNH.shape
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    q = (q_BNH * H**-0.5).reshape(B, K, N // K, H)
    scores = jnp.einsum("BKGH,BKHS->BKGS", q, k_BKHS, preferred_element_type=jnp.float32)
    scores = jnp.where(cache_mask(lengths, S, window)[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", probs, v_BKSH).reshape(B, N, H)
