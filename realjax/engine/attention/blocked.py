"""Blocks of queries against the keys that they may reach, in plain JAX, with a backward pass that keeps no scores."""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from realjax.engine.attention.reference import cap_scores, packed_mask
from realjax.models.attention import Scoring

# attend_fn(q [R, K, G T, H], k, v [R, K, S, H], mask [R, T, S], sinks [K, G T, 1], softcap) -> [R, K, G T, H]
AttendFn = Callable[[Array, Array, Array, Array, Array | None, float | None], Array]


def make_blocked(attend_fn: AttendFn) -> Callable[..., Array]:
    """Returns attention in blocks of queries, each of which `attend_fn` attends to the keys that it may reach.

    It is a fraction of the work and the memory of `dense`. A row much longer than the window is cut into chunks, which
    are then rows like the others, with the chunk before each as keys that come first: few large products instead of
    many small ones.
    """

    def attend(
        q: Array,
        k: Array,
        v: Array,
        segment_ids: Array,
        scoring: Scoring,
        sinks: Array | None = None,
        max_segment_len: int | None = None,
    ) -> Array:
        R, T, N, H = q.shape
        K = k.shape[2]
        # Segments of at most so many tokens are a window that no token reaches beyond.
        bounds = (scoring.window, max_segment_len)
        window = min((bound for bound in bounds if bound is not None and bound < T), default=None)
        size = block_len(T, T if window is None else window)
        chunk = _chunk_len(T, T if window is None else window, size)
        past = 0 if chunk == T else chunk
        # Heads before time, once and for the small arrays: the scores then come out as the softmax reads them.
        q = (q * scoring.find_scale(H)).reshape(-1, chunk, K, N // K, H).transpose(0, 2, 3, 1, 4)
        k, v, k_segments = (_with_chunk_before(x, chunk) for x in (k, v, segment_ids))
        k, v, q_segments = k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids.reshape(-1, chunk)
        if sinks is not None:  # of each query of a block
            sinks = jnp.repeat(sinks.reshape(K, N // K, 1), size, axis=1)
        outputs = []
        for start in range(0, chunk, size):
            end, here = start + size, past + start
            first = 0 if window is None else max(0, (here - window + 1) // size * size)
            mask = packed_mask(q_segments[:, start:end], k_segments[:, first : past + end], here - first, window)
            block = q[:, :, :, start:end].reshape(-1, K, N // K * size, H)
            seen = slice(first, past + end)
            attended = attend_fn(block, k[:, :, seen], v[:, :, seen], mask, sinks, scoring.softcap)
            outputs.append(attended.reshape(-1, K, N // K, size, H))
        return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(R, T, N, H)

    return attend


def _with_chunk_before(x: Array, chunk: int) -> Array:
    """`[R, T, ...]` -> `[R * T/chunk, 2 chunk, ...]`: each chunk after the one before it, a row's first after zeros."""
    R, T = x.shape[:2]
    if chunk == T:
        return x
    chunks = x.reshape(R, T // chunk, chunk, *x.shape[2:])
    before = jnp.pad(chunks[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 1))
    return jnp.concatenate([before, chunks], axis=2).reshape(-1, 2 * chunk, *x.shape[2:])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, mask: Array, sinks: Array | None, softcap: float | None) -> Array:
    """Returns attention of scaled queries `[R, K, G T, H]` to keys and values `[R, K, S, H]` under a mask `[R, T, S]`,
    with sinks `[K, G T, 1]`.

    The backward pass computes the scores again from each query's log normaliser, as in arXiv:2205.14135: compared with
    differentiating a softmax it passes over them half as often, and what is kept does not grow with the keys.
    """
    return attend_forward(q, k, v, mask, sinks, softcap)[0]


def make_scores(q: Array, k: Array, softcap: float | None) -> Array:
    """Returns the scores `[R, K, Q, S]`, float32, within the cap if there is one."""
    return cap_scores(jnp.einsum("RKQH,RKSH->RKQS", q, k, preferred_element_type=jnp.float32), softcap)


def _mask_scores(scores: Array, mask: Array) -> Array:
    (R, K, Q, S), T = scores.shape, mask.shape[1]
    # Added, not selected: XLA's CPU backend takes a sum into the pass that follows.
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    return (scores.reshape(R, K, Q // T, T, S) + bias[:, None, None]).reshape(R, K, Q, S)


def weigh_keys(
    q: Array, k: Array, mask: Array, sinks: Array | None, softcap: float | None
) -> tuple[Array, Array, Array]:
    """Returns the weights of keys `[R, K, Q, S]`, their sums, and the largest scores, which these are relative to."""
    scores = _mask_scores(make_scores(q, k, softcap), mask)
    largest = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - largest)
    return weights, total, largest


def attend_forward(
    q: Array, k: Array, v: Array, mask: Array, sinks: Array | None, softcap: float | None
) -> tuple[Array, tuple[Array | None, ...]]:
    """Returns what `_attend` does, and what `attend_backward` needs."""
    weights, total, largest = weigh_keys(q, k, mask, sinks, softcap)
    summed = jnp.einsum("RKQS,RKSH->RKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    attended = (summed / total).astype(v.dtype)
    return attended, (q, k, v, mask, sinks, largest + jnp.log(total), attended)


def _sum_queries(scores: Array, x: Array) -> Array:
    """Returns the sum over queries of scores `[R, K, Q, S]` times x `[R, K, Q, H]`: `[R, K, S, H]`."""
    return jnp.einsum("RKQS,RKQH->RKSH", scores, x)


def attend_backward(
    softcap: float | None,
    residuals: tuple[Array, ...],
    grad: Array,
    sum_queries: Callable[[Array, Array], Array] = _sum_queries,
) -> tuple[Array, Array, Array, None, Array | None]:
    """Returns the gradients of queries, keys, values and sinks."""
    q, k, v, mask, sinks, log_total, attended = residuals
    scores = make_scores(q, k, softcap)
    probs = jnp.exp(_mask_scores(scores, mask) - log_total)
    grad_probs = jnp.einsum("RKQH,RKSH->RKQS", grad, v, preferred_element_type=jnp.float32)
    mean_grad = jnp.sum(grad.astype(jnp.float32) * attended, axis=-1, keepdims=True)
    grad_scores = probs * (grad_probs - mean_grad)
    if softcap is not None:
        grad_scores *= 1 - jnp.square(scores / softcap)
    grad_scores = grad_scores.astype(q.dtype)
    grad_q = jnp.einsum("RKQS,RKSH->RKQH", grad_scores, k)
    grad_k, grad_v = sum_queries(grad_scores, q), sum_queries(probs.astype(v.dtype), grad)
    # A sink has a score like a key, and a value of zero.
    grad_sinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - log_total) * mean_grad, axis=0)
    return grad_q, grad_k, grad_v, None, grad_sinks


_attend.defvjp(attend_forward, attend_backward)
blocked_attention = make_blocked(cast(AttendFn, _attend))


def _chunk_len(row_len: int, reach: int, size: int) -> int:
    """Returns the shortest part of a row, in whole blocks, that no query looks back beyond; the row unless it has four.

    With fewer parts the keys before the first one, all masked, cost more than larger products win.
    """
    lengths = range(size, row_len // 4 + 1, size)
    return next((n for n in lengths if row_len % n == 0 and n >= reach - 1), row_len)


def block_len(row_len: int, reach: int) -> int:
    """Returns the queries of a block: an eighth of the row or a quarter of how far back they look, but at least 64."""
    limit = min(max(64, min(row_len // 8, reach // 4)), row_len)
    size = next(n for n in range(limit, 0, -1) if row_len % n == 0)
    # A row length without such a divisor would fall apart into single tokens.
    return size if size * 4 >= limit else row_len
