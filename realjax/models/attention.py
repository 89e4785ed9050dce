"""Attention over packed rows: the module, and the backends behind one function.

A token attends to the tokens of its own segment at or before it (within the sliding window, if any). Padding is
segment 0 and attends to padding only, so every row of scores has a finite maximum.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from realjax.core.axes import Constrain
from realjax.models.config import ModelConfig
from realjax.models.layers import Linear, RMSNorm, apply_rope

# attention_fn(q_RTNH, k_RTKH, v_RTKH, segment_ids_RT, window) -> RTNH
AttentionFn = Callable[[Array, Array, Array, Array, int | None], Array]
# attend_fn(q_RTNH, k_RTKH, v_RTKH) -> RTNH: attention with all else fixed; a cache may stand behind it.
AttendFn = Callable[[Array, Array, Array], Array]


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


def dense_attention(q: Array, k: Array, v: Array, segment_ids: Array, window: int | None) -> Array:
    """The reference: one `[T, T]` score matrix per row and head."""
    return masked_attention(q, k, v, packed_mask(segment_ids, segment_ids, 0, window))


def blocked_attention(q: Array, k: Array, v: Array, segment_ids: Array, window: int | None) -> Array:
    """Blocks of queries against the keys they may reach: a fraction of the work and the memory of `dense`.

    A row much longer than the window is cut into chunks, which are then rows like the others, with the chunk before
    each as keys that come first: few large products instead of many small ones. No scores are kept for the backward
    pass, see `_attend`.
    """
    R, T, N, H = q.shape
    K = k.shape[2]
    size = _block_len(T, T if window is None else window)
    chunk = _chunk_len(T, T if window is None else window, size)
    past = 0 if chunk == T else chunk
    # Heads before time, once and for the small arrays: the scores then come out as the softmax reads them.
    q = (q * H**-0.5).reshape(-1, chunk, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v, k_segments = (_with_chunk_before(x, chunk) for x in (k, v, segment_ids))
    k, v, q_segments = k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids.reshape(-1, chunk)
    outputs = []
    for start in range(0, chunk, size):
        end, here = start + size, past + start
        first = 0 if window is None else max(0, (here - window + 1) // size * size)
        mask = packed_mask(q_segments[:, start:end], k_segments[:, first : past + end], here - first, window)
        block = q[:, :, :, start:end].reshape(-1, K, N // K * size, H)
        attended = _attend(block, k[:, :, first : past + end], v[:, :, first : past + end], mask)
        outputs.append(attended.reshape(-1, K, N // K, size, H))
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(R, T, N, H)


def _with_chunk_before(x: Array, chunk: int) -> Array:
    """`[R, T, ...]` -> `[R * T/chunk, 2 chunk, ...]`: each chunk after the one before it, a row's first after zeros."""
    R, T = x.shape[:2]
    if chunk == T:
        return x
    chunks = x.reshape(R, T // chunk, chunk, *x.shape[2:])
    before = jnp.pad(chunks[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 1))
    return jnp.concatenate([before, chunks], axis=2).reshape(-1, 2 * chunk, *x.shape[2:])


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Returns attention of scaled queries `[R, K, G T, H]` to keys and values `[R, K, S, H]` under a mask `[R, T, S]`.

    The backward pass computes the scores again from each query's log normaliser, as in arXiv:2205.14135: compared with
    differentiating a softmax it passes over them half as often, and compared with keeping them it is no slower.
    """
    return _attend_forward(q, k, v, mask)[0]


def _masked_scores(q: Array, k: Array, mask: Array) -> Array:
    R, K, Q, _ = q.shape
    T, S = mask.shape[1:]
    scores = jnp.einsum("RKQH,RKSH->RKQS", q, k, preferred_element_type=jnp.float32)
    # Added, not selected: XLA's CPU backend takes a sum into the pass that follows.
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    return (scores.reshape(R, K, Q // T, T, S) + bias[:, None, None]).reshape(R, K, Q, S)


def _attend_forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = _masked_scores(q, k, mask)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    summed = jnp.einsum("RKQS,RKSH->RKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    attended = (summed / total).astype(v.dtype)
    return attended, (q, k, v, mask, largest + jnp.log(total), attended)


def _attend_backward(residuals: tuple[Array, ...], grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, log_total, attended = residuals
    probs = jnp.exp(_masked_scores(q, k, mask) - log_total)
    grad_probs = jnp.einsum("RKQH,RKSH->RKQS", grad, v, preferred_element_type=jnp.float32)
    mean_grad = jnp.sum(grad.astype(jnp.float32) * attended, axis=-1, keepdims=True)
    grad_scores = (probs * (grad_probs - mean_grad)).astype(q.dtype)
    grad_q = jnp.einsum("RKQS,RKSH->RKQH", grad_scores, k)
    grad_k = jnp.einsum("RKQS,RKQH->RKSH", grad_scores, q)
    return grad_q, grad_k, jnp.einsum("RKQS,RKQH->RKSH", probs.astype(v.dtype), grad), None


_attend.defvjp(_attend_forward, _attend_backward)


def _chunk_len(row_len: int, reach: int, size: int) -> int:
    """Returns the shortest part of a row, in whole blocks, that no query looks back beyond; the row unless it has four.

    With fewer parts the keys before the first one, all masked, cost more than larger products win.
    """
    lengths = range(size, row_len // 4 + 1, size)
    return next((n for n in lengths if row_len % n == 0 and n >= reach - 1), row_len)


def _block_len(row_len: int, reach: int) -> int:
    """Returns the queries of a block: an eighth of the row or a quarter of how far back they look, but at least 64."""
    limit = min(max(64, min(row_len // 8, reach // 4)), row_len)
    size = next(n for n in range(limit, 0, -1) if row_len % n == 0)
    # A row length without such a divisor would fall apart into single tokens.
    return size if size * 4 >= limit else row_len


def fused_attention(
    q: Array, k: Array, v: Array, segment_ids: Array, window: int | None, *, implementation: Literal["xla", "cudnn"]
) -> Array:
    """JAX's own attention under the packed mask, which cuDNN takes as a bias of one head: `[R, 1, T, T]` of memory.

    cuDNN asks for 16-bit types, a head size that is a multiple of 8 up to 128 (256 on Hopper), and a GPU; ValueError
    or RuntimeError from JAX where it finds another.
    """
    mask = packed_mask(segment_ids, segment_ids, 0, window)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)


BACKENDS: dict[str, AttentionFn] = {
    "dense": dense_attention,
    "blocked": blocked_attention,
    "xla": partial(fused_attention, implementation="xla"),
    "cudnn": partial(fused_attention, implementation="cudnn"),
}


def make_attention(backend: str, num_shards: int = 1, max_segment_len: int | None = None) -> AttentionFn:
    """Returns the backend's function for heads split over `num_shards` devices and segments of at most
    `max_segment_len`.

    A token never looks further back than its segment reaches, so a bound on segments bounds the work of long rows.
    Key-value heads that do not divide over the shards are repeated to one per query head: each shard then holds its
    own. Raises ValueError for an unknown backend.
    """
    name = "blocked" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"attention backend: found '{backend}'; use one of auto, {', '.join(BACKENDS)}")
    attend = BACKENDS[name]

    def attention_fn(q: Array, k: Array, v: Array, segment_ids: Array, window: int | None) -> Array:
        if k.shape[2] % num_shards:
            k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        bounds = [bound for bound in (window, max_segment_len) if bound is not None and bound < q.shape[1]]
        window = min(bounds, default=None)
        return attend(q, k, v, segment_ids, window)

    return attention_fn


class Attention(nnx.Module):
    """Multi-head attention with grouped key-value heads and rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        D, H = {"embed": config.hidden_size}, {"head_dim": config.head_dim}
        queries, keys = {"q_heads": config.num_q_heads, **H}, {"kv_heads": config.num_kv_heads, **H}
        self.q = Linear(D, queries, config.qkv_bias)
        self.k = Linear(D, keys, config.qkv_bias)
        self.v = Linear(D, keys, config.qkv_bias)
        self.o = Linear(queries, D, config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, "head_dim") if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, "head_dim") if config.qk_norm else None

    def project(self, x_RTD: Array, cos: Array, sin: Array, constrain: Constrain) -> tuple[Array, Array, Array]:
        """Returns rotated q `[R, T, N, H]` and k, and v `[R, T, K, H]`."""
        q, k, v = self.q(x_RTD), self.k(x_RTD), self.v(x_RTD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = constrain(apply_rope(q, cos, sin), ("rows", "time", "q_heads", "head_dim"))
        k = constrain(apply_rope(k, cos, sin), ("rows", "time", "kv_heads", "head_dim"))
        return q, k, constrain(v, ("rows", "time", "kv_heads", "head_dim"))

    def __call__(self, x_RTD: Array, cos: Array, sin: Array, attend_fn: AttendFn, constrain: Constrain) -> Array:
        q, k, v = self.project(x_RTD, cos, sin, constrain)
        attended = constrain(attend_fn(q, k, v), ("rows", "time", "q_heads", "head_dim"))
        return self.o(attended, merge_rows=not constrain.splits_residuals)
