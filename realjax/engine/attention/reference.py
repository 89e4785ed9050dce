"""Attention as it is defined: every score at once. The other kernels are tested against these."""

import jax
import jax.numpy as jnp
from jax import Array

from realjax.models.attention import Scoring


def packed_mask(q_segments: Array, k_segments: Array, q_start: int, window: int | None) -> Array:
    """Returns the mask `[R, T, S]`, True where query t (at row index q_start + t) may see key s."""
    t = q_start + jnp.arange(q_segments.shape[1])[:, None]
    s = jnp.arange(k_segments.shape[1])[None, :]
    near = s <= t if window is None else (s <= t) & (s > t - window)
    return (q_segments[:, :, None] == k_segments[:, None, :]) & near


def cap_scores(scores: Array, softcap: float | None) -> Array:
    """Returns the scores, which stay within the cap, if any (arXiv:2408.00118)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def softmax(scores: Array, sinks: Array | None) -> Array:
    """Returns the softmax over the last dim of scores `[*B, S]`, of which sinks, like `[*B, 1]`, take a part."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]


def dense_attention(
    q_RTNH: Array,
    k_RTKH: Array,
    v_RTKH: Array,
    segment_ids: Array,
    scoring: Scoring,
    sinks: Array | None = None,
    max_segment_len: int | None = None,
) -> Array:
    """Returns softmax(q k^T scale) v over the keys that count, grouped heads, softmax in float32: `[R, T, N, H]`."""
    R, T, N, H = q_RTNH.shape
    K = k_RTKH.shape[2]
    mask = packed_mask(segment_ids, segment_ids, 0, scoring.window)
    q = (q_RTNH * scoring.find_scale(H)).reshape(R, T, K, N // K, H)
    scores = jnp.einsum("RTKGH,RSKH->RKGTS", q, k_RTKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], cap_scores(scores, scoring.softcap), jnp.finfo(jnp.float32).min)
    probs = softmax(scores, None if sinks is None else sinks.reshape(K, N // K, 1, 1)).astype(v_RTKH.dtype)
    return jnp.einsum("RKGTS,RSKH->RTKGH", probs, v_RTKH).reshape(R, T, N, H)


def cache_mask(lengths: Array, cache_len: int, window: int | None) -> Array:
    """Returns the mask `[B, S]`, True where token number `lengths` `[B]` of its row may see what is at index s.

    That is token s; with a window, the last one so far whose number is s modulo the length.
    """
    index = jnp.arange(cache_len)[None]
    if window is None:
        return index <= lengths[:, None]
    back = (lengths[:, None] - index) % cache_len
    return (back < window) & (back <= lengths[:, None])


def dense_decoding(
    q_BNH: Array, k_BKHS: Array, v_BKSH: Array, lengths: Array, scoring: Scoring, sinks: Array | None = None
) -> Array:
    """One row of scores per query, against the cache as it lies."""
    B, N, H = q_BNH.shape
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    q = (q_BNH * scoring.find_scale(H)).reshape(B, K, N // K, H)
    scores = jnp.einsum("BKGH,BKHS->BKGS", q, k_BKHS, preferred_element_type=jnp.float32)
    mask = cache_mask(lengths, S, scoring.window)[:, None, None]
    scores = jnp.where(mask, cap_scores(scores, scoring.softcap), jnp.finfo(jnp.float32).min)
    probs = softmax(scores, None if sinks is None else sinks.reshape(K, N // K, 1)).astype(v_BKSH.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", probs, v_BKSH).reshape(B, N, H)
