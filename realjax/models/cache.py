"""The key-value cache, and the two uses of the blocks that fill and read it: whole prompts, and new tokens of rows.

A layer with a window keeps the last tokens only: its S places, see `config.count_places`, are a ring, token t at
t mod S. Up to S tokens a row it lies as in any other layer. What takes a token's place is never one that it sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array

from realjax.models.attention import BlockContext, DecodingFn, Scoring
from realjax.models.config import ModelConfig, count_places
from realjax.models.rope import make_tables
from realjax.models.stacks import Aux
from realjax.models.transformer import Block, Forward, Transformer

PadFn = Callable[[Array, int, int], Array]
BlockCall = Callable[[Array, BlockContext], tuple[Array, Aux]]  # as a `Block` is called


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys `[..., B, K, H, S]` and values `[..., B, K, S, H]` of each layer, in the places S that it has.

    Both of decoding's products then read the cache as it lies; with the heads inside, it was transposed every token.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    windows: tuple[int | None, ...] = field(metadata={"static": True})  # of each layer
    length: int = field(metadata={"static": True})  # tokens that a row has room for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewTokens:
    """Where the new tokens of B rows go."""

    lengths: Array  # [B] the index of the first: the tokens before it
    is_running: Array  # [B] False of an idle row: what is made of its tokens is not read, and no expert sees them


# Names of the dims that keys and values agree on, rows first; the two within a head are never split.
CACHE_NAMES = ("rows", "kv_heads", "head_dim", "head_dim")


def init_cache(
    config: ModelConfig, order: Sequence[str], rows: tuple[int, ...], length: int, dtype: jnp.dtype
) -> KVCache:
    """Returns an empty cache of layers of the kinds `order`, with `rows` for its leading dims."""
    heads, size = (*rows, config.num_kv_heads), config.head_dim
    windows = tuple(config.kinds[name].mixer.window for name in order)
    places = [count_places(window, length) for window in windows]
    keys = tuple(jnp.zeros((*heads, size, num), dtype) for num in places)
    return KVCache(keys, tuple(jnp.zeros((*heads, num, size), dtype) for num in places), windows, length)


def pad_dim(x: Array, dim: int, length: int) -> Array:
    """Returns the array with zeros at the end of `dim`, counted from the last as -1, up to `length`."""
    more = (0, length - x.shape[dim])
    return jnp.pad(x, [more if i == x.ndim + dim else (0, 0) for i in range(x.ndim)])


def grow_cache(cache: KVCache, length: int, pad_fn: PadFn = pad_dim) -> KVCache:
    """Returns the cache with room for `length` tokens a row; `pad_fn`, called as `pad_dim`, makes one array each.

    A ring that is as long as its window needs stays. A shorter one has not come round: its tokens are at their index.
    """

    def grow(arrays: tuple[Array, ...], dim: int) -> tuple[Array, ...]:
        places = [count_places(window, length) for window in cache.windows]
        return tuple(x if x.shape[dim] == num else pad_fn(x, dim, num) for x, num in zip(arrays, places))

    return replace(cache, keys=grow(cache.keys, -1), values=grow(cache.values, -2), length=length)


def write_rows(cache: KVCache, prompts: KVCache, sources: Array, slots: Array) -> KVCache:
    """Returns the cache with the rows `sources` `[R]` of `prompts` at `slots` `[R]`; a slot beyond the last is dropped.

    Prompts may be padded to more than the cache has room for, not longer. Rings of both are as long, or hold no more
    than the shorter has places for.
    """

    def write(x: Array, new: Array, dim: int) -> Array:
        length = min(x.shape[dim], new.shape[dim])
        at = (slots, *[slice(None)] * (x.ndim + dim - 1), slice(length))
        return x.at[at].set(jax.lax.slice_in_dim(new, 0, length, axis=dim)[sources], mode="drop")

    keys = (write(x, new, -1) for x, new in zip(cache.keys, prompts.keys))
    values = (write(x, new, -2) for x, new in zip(cache.values, prompts.values))
    return replace(cache, keys=tuple(keys), values=tuple(values))


def take_last(x: Array, lengths: Array, num: int) -> Array:
    """Returns rows `[B, T, ...]` of `lengths` `[B]` tokens as a ring `[B, num, ...]` of the last of them."""
    last = lengths[:, None] - 1
    # Places that no token of a shorter row has come to get its first one, which is not read there.
    index = jnp.maximum(last - (last - jnp.arange(num)) % num, 0)
    # Mapped over rows, the reads stay on the devices that hold them.
    return jax.vmap(lambda row, index: row[index])(x, index)


def prefill(
    transformer: Transformer,
    blocks: Sequence[Block],
    tokens: Array,
    lengths: Array,
    forward: Forward,
) -> tuple[Array, KVCache]:
    """Returns the final hidden state of each prompt's last token `[B, D]`, and the cache of the prompts.

    `tokens` `[B, T]` are padded on the right, `lengths` `[B]` says where.
    """
    x = transformer.embed_tokens(tokens, count_positions(tokens), constrain=forward.constrain)
    x, cache = prefill_blocks(transformer.config, blocks, x, lengths, forward)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return transformer.read_out(last, forward.products)[:, 0], cache


def count_positions(x: Array) -> Array:
    """Returns the positions `[B, T]` of prompts `[B, T, ...]`."""
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


def prefill_blocks(
    config: ModelConfig,
    blocks: Sequence[BlockCall],
    x: Array,
    lengths: Array,
    forward: Forward,
) -> tuple[Array, KVCache]:
    """Returns the hidden states `[B, T, D]` after some blocks of prompts padded on the right, and their cache."""
    positions = count_positions(x)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    keys: list[Array] = []
    values: list[Array] = []
    windows: list[int | None] = []

    def attend_fn(q: Array, k: Array, v: Array, scoring: Scoring, sinks: Array | None) -> Array:
        windows.append(scoring.window)
        num = count_places(scoring.window, x.shape[1])
        kept = (k, v) if num == x.shape[1] else (take_last(k, lengths, num), take_last(v, lengths, num))
        keys.append(jnp.einsum("BSKH->BKHS", kept[0]))
        values.append(jnp.einsum("BSKH->BKSH", kept[1]))
        return forward.attention_fn(q, k, v, segment_ids, scoring, sinks)

    context = BlockContext(
        rotations=dict(zip(config.ropes, make_tables(config.ropes, config.head_dim, positions, forward.products))),
        segment_ids=segment_ids,
        attend_fn=attend_fn,
        constrain=forward.constrain,
        products=forward.products,
        route_fn=forward.route_fn,
    )
    for block in blocks:
        x, _ = block(x, context)
    return x, KVCache(tuple(keys), tuple(values), tuple(windows), x.shape[1])


def decode(
    transformer: Transformer,
    blocks: Sequence[Block],
    cache: KVCache,
    tokens: Array,
    rows: NewTokens,
    decoding_fn: DecodingFn,
    forward: Forward,
) -> tuple[Array, KVCache]:
    """Returns the final hidden states `[B, T, D]` of T new tokens a row, and the cache with them.

    `tokens` `[B, T]` see all tokens before them in their rows (within the window). Of several, those beyond the cache's
    room are not kept, and what comes of them is not to be read; a ring needs places for them, see
    `config.find_lookup_fault`.
    """
    x = transformer.embed_tokens(tokens, _find_positions(rows.lengths, tokens.shape[1]))
    x, cache = decode_blocks(transformer.config, blocks, cache, x, rows, decoding_fn, forward)
    return transformer.read_out(x, forward.products), cache


def decode_blocks(
    config: ModelConfig,
    blocks: Sequence[BlockCall],
    cache: KVCache,
    x: Array,
    rows: NewTokens,
    decoding_fn: DecodingFn,
    forward: Forward,
) -> tuple[Array, KVCache]:
    """Returns the hidden states `[B, T, D]` after some blocks of T new tokens a row, and the cache with them."""
    lengths, num_new = rows.lengths, x.shape[1]
    positions = _find_positions(lengths, num_new)
    all_keys: list[Array] = []
    all_values: list[Array] = []

    def attend_fn(q: Array, k: Array, v: Array, scoring: Scoring, sinks: Array | None) -> Array:
        keys, values = cache.keys[len(all_keys)], cache.values[len(all_values)]
        num = keys.shape[-1]
        if num_new == 1:  # without a dim of 1 in the products
            at = lengths if scoring.window is None else lengths % num
            keys, values = _write_key(keys, k[:, 0], at), _write_value(values, v[:, 0], at)
        else:
            places = positions if scoring.window is None else positions % num
            at = jnp.where(positions < cache.length, places, num)
            keys = _write_key(keys, jnp.einsum("BTKH->BKHT", k), at)
            values = _write_value(values, jnp.einsum("BTKH->BKTH", v), at)
        all_keys.append(keys)
        all_values.append(values)
        attend = lambda q, lengths: decoding_fn(q, keys, values, lengths, scoring, sinks)
        if num_new == 1:
            return attend(q[:, 0], lengths)[:, None]
        # The cache has no dim of new tokens: it is read once for all of them.
        return jax.vmap(attend, in_axes=1, out_axes=1)(q, positions)

    context = BlockContext(
        rotations=dict(zip(config.ropes, make_tables(config.ropes, config.head_dim, positions, forward.products))),
        segment_ids=jnp.broadcast_to(rows.is_running[:, None], positions.shape).astype(jnp.int32),
        attend_fn=attend_fn,
        constrain=forward.constrain,
        products=forward.products,
        route_fn=forward.route_fn,
    )
    for block in blocks:
        x, _ = block(x, context)
    return x, replace(cache, keys=tuple(all_keys), values=tuple(all_values))


def _find_positions(lengths: Array, num_new: int) -> Array:
    """Returns the positions `[B, T]` of new tokens."""
    return lengths[:, None] if num_new == 1 else lengths[:, None] + jnp.arange(num_new)


# Mapped over rows, the writes stay on the devices that hold them.
_write_key = jax.vmap(lambda row, new, at: row.at[:, :, at].set(new, mode="drop"))
_write_value = jax.vmap(lambda row, new, at: row.at[:, at].set(new, mode="drop"))
