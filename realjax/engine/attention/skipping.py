"""Blocks of queries against the blocks of keys from their first segment's start on: those before are left out.

How many that are depends on the data: the blocks run one after the other, and each takes the shortest of a few numbers
of keys that holds all that it may see. So shapes are static, forward and backward.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from realjax.engine.attention.blocked import attend_backward, attend_forward, block_len
from realjax.engine.attention.keeping import keeping_attention, sum_queries
from realjax.engine.attention.reference import packed_mask
from realjax.models.attention import Scoring

NUM_SPANS = 4  # numbers of keys to choose from, each of which is compiled
# Of a row: in shorter ones there is little to leave out. Of short reaches it is more, since `keeping` multiplies faster
# and keeps few weights there.
LEAST_REACHES, LEAST_SHORT_REACHES, SHORT_REACH = 2, 4, 256


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """How rows are cut: `size` queries a block, behind up to `most` blocks of keys before it, of which the shortest of
    `spans` is taken that is enough.
    """

    size: int
    most: int
    spans: tuple[int, ...]
    window: int | None
    softcap: float | None

    @classmethod
    def of(cls, row_len: int, reach: int, scoring: Scoring) -> "_Blocks":
        """Returns the blocks for queries that look back at `reach` tokens, themselves included."""
        size = block_len(row_len, reach)
        most = math.ceil((reach - 1) / size)
        spans = sorted({math.ceil(most * i / (NUM_SPANS - 1)) for i in range(NUM_SPANS)})
        return cls(size=size, most=most, spans=tuple(spans), window=scoring.window, softcap=scoring.softcap)

    @property
    def before(self) -> int:
        """Keys before a block at most."""
        return self.most * self.size

    def choose(self, segment_ids: Array) -> Array:
        """Returns for each block, row by row, which of the spans it takes, `[R * T / size]`."""
        R, T = segment_ids.shape
        is_first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        starts = jax.lax.cummax(jnp.where(is_first, jnp.arange(T), 0), axis=1)
        here = jnp.arange(0, T, self.size)
        # A block that begins with padding has nothing else, and what comes out of it is not read.
        back = jnp.where(segment_ids[:, :: self.size] > 0, here - starts[:, :: self.size], 0)
        if self.window is not None:
            back = jnp.minimum(back, self.window - 1)
        return jnp.searchsorted(jnp.array(self.spans), -(-back // self.size), side="left").reshape(-1)

    def cut(self, x: Array) -> Array:
        """`[R, T, K, G, H]` -> `[R * T / size, 1, K, G size, H]`."""
        R, T, K, G, H = x.shape
        blocks = x.reshape(R, T // self.size, self.size, K, G, H).transpose(0, 1, 3, 4, 2, 5)
        return blocks.reshape(-1, 1, K, G * self.size, H)

    def join(self, blocks: Array, like: Array) -> Array:
        """The inverse of `cut`, for what is of the shape of `like`."""
        R, T, K, G, H = like.shape
        x = blocks.reshape(R, T // self.size, K, G, self.size, H).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(R, T, K, G, H)

    def lead(self, x: Array) -> Array:
        """`[R, T, K, H]` -> `[R, K, before + T, H]`: heads first, with room for keys before the first block."""
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (self.before, 0), (0, 0)))


def skipping_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    scoring: Scoring,
    sinks: Array | None = None,
    max_segment_len: int | None = None,
) -> Array:
    """Packed rows: the work is that of their segments. Rows with little to leave out go to `keeping`."""
    R, T, N, H = q.shape
    K = k.shape[2]
    reach = min(T if bound is None else bound for bound in (scoring.window, max_segment_len, T))
    blocks = _Blocks.of(T, reach, scoring)
    least = LEAST_SHORT_REACHES if reach <= SHORT_REACH else LEAST_REACHES
    if blocks.most < 2 or blocks.before * least > T:
        return keeping_attention(q, k, v, segment_ids, scoring, sinks, max_segment_len)
    q = (q * scoring.find_scale(H)).reshape(R, T, K, N // K, H)
    of_queries = None if sinks is None else jnp.repeat(sinks.reshape(K, N // K, 1), blocks.size, axis=1)
    attended = cast(Array, _attend(q, k, v, jnp.asarray(segment_ids), of_queries, blocks))
    return attended.reshape(R, T, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, segment_ids: Array, sinks: Array | None, blocks: _Blocks) -> Array:
    """Returns attention of scaled queries `[R, T, K, G, H]` to keys and values `[R, T, K, H]`."""
    return _forward(q, k, v, segment_ids, sinks, blocks)[0]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Keys, values `[R, K, before + T, H]` and segments of rows, of which a block reads a part."""

    k: Array
    v: Array
    q_segments: Array  # [R * T / size, size]
    k_segments: Array  # [R, before + T]
    blocks: _Blocks

    @classmethod
    def of(cls, k: Array, v: Array, segment_ids: Array, blocks: _Blocks) -> "_Rows":
        """Returns the rows of keys and values `[R, T, K, H]`."""
        # No query is of segment -1.
        k_segments = jnp.pad(segment_ids, ((0, 0), (blocks.before, 0)), constant_values=-1)
        q_segments = segment_ids.reshape(-1, blocks.size)
        return cls(k=blocks.lead(k), v=blocks.lead(v), q_segments=q_segments, k_segments=k_segments, blocks=blocks)

    def find_place(self, number: Array) -> tuple[Array, Array]:
        """Returns the row of a block, and where the keys begin that it may see."""
        per_row = len(self.q_segments) // len(self.k)
        return number // per_row, number % per_row * self.blocks.size

    def read(self, number: Array) -> tuple[Array, ...]:
        """Returns all that a block may see: keys, values `[1, K, S, H]`, their segments `[1, S]`, and its own."""
        row, start = self.find_place(number)
        length = self.blocks.before + self.blocks.size
        take = lambda x: jax.lax.dynamic_slice(x, (row, 0, start, 0), (1, x.shape[1], length, x.shape[3]))
        k_segments = jax.lax.dynamic_slice(self.k_segments, (row, start), (1, length))
        return take(self.k), take(self.v), k_segments, self.q_segments[number][None]

    def add(self, total: Array, part: Array, number: Array) -> Array:
        """Returns sums of the form of `k` with a block's part `[1, K, S, H]` added."""
        row, start = self.find_place(number)
        at = (row, 0, start, 0)
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, at, part.shape) + part, at)


def _shorten(blocks: _Blocks, span: int, seen: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    """Returns keys, values and mask of what a block may see, of which so many blocks before it."""
    k, v, k_segments, q_segments = seen
    length = (span + 1) * blocks.size
    mask = packed_mask(q_segments, k_segments[:, -length:], span * blocks.size, blocks.window)
    return k[:, :, -length:], v[:, :, -length:], mask


def _forward(
    q: Array, k: Array, v: Array, segment_ids: Array, sinks: Array | None, blocks: _Blocks
) -> tuple[Array, tuple[Array | None, ...]]:
    rows, queries, choice = _Rows.of(k, v, segment_ids, blocks), blocks.cut(q), blocks.choose(segment_ids)

    def attend(span: int, q: Array, *seen: Array) -> tuple[Array, Array]:
        attended, residuals = attend_forward(q, *_shorten(blocks, span, seen), sinks, blocks.softcap)
        return attended, cast(Array, residuals[-2])

    def one(carry: None, block: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        number, choice, q = block
        return carry, jax.lax.switch(choice, [partial(attend, span) for span in blocks.spans], q, *rows.read(number))

    _, (attended, log_total) = jax.lax.scan(one, None, (jnp.arange(len(queries)), choice, queries))
    return blocks.join(attended, q), (q, k, v, segment_ids, sinks, log_total, attended)


def _backward(
    blocks: _Blocks, residuals: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array, None, Array | None]:
    q, k, v, segment_ids, sinks, log_total, attended = residuals
    rows, queries, choice = _Rows.of(k, v, segment_ids, blocks), blocks.cut(q), blocks.choose(segment_ids)

    def differentiate(span: int, block: tuple[Array, ...], *seen: Array) -> tuple[Array, ...]:
        q, log_total, attended, grad = block
        given = (q, *_shorten(blocks, span, seen), sinks, log_total, attended)
        grad_q, grad_k, grad_v, _, grad_sinks = attend_backward(blocks.softcap, given, grad, sum_queries)
        left_out = ((0, 0), (0, 0), (blocks.before - span * blocks.size, 0), (0, 0))
        parts = (grad_q, jnp.pad(grad_k, left_out), jnp.pad(grad_v, left_out))
        return parts if grad_sinks is None else (*parts, grad_sinks)

    def one(totals: tuple[Array, ...], block: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        number, choice, *rest = block
        branches = [partial(differentiate, span) for span in blocks.spans]
        grad_q, grad_k, grad_v, *of_sinks = jax.lax.switch(choice, branches, tuple(rest), *rows.read(number))
        of_keys = rows.add(totals[0], grad_k, number), rows.add(totals[1], grad_v, number)
        return (*of_keys, *(total + part for total, part in zip(totals[2:], of_sinks, strict=True))), grad_q

    zeros = (jnp.zeros_like(rows.k), jnp.zeros_like(rows.v), *(() if sinks is None else (jnp.zeros_like(sinks),)))
    given = (jnp.arange(len(queries)), choice, queries, log_total, attended, blocks.cut(grad))
    totals, grad_q = jax.lax.scan(one, zeros, given)
    grad_k, grad_v = (x[:, :, blocks.before :].swapaxes(1, 2) for x in totals[:2])
    return blocks.join(grad_q, q), grad_k, grad_v, None, None if sinks is None else totals[2]


_attend.defvjp(_forward, _backward)
