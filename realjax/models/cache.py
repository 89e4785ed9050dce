"""The key-value cache, and the two uses of the blocks that fill and read it: whole prompts, and one token a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from realjax.models.attention import BlockContext, DecodingFn, Scoring
from realjax.models.config import ModelConfig
from realjax.models.rope import rope_tables
from realjax.models.stacks import Aux
from realjax.models.transformer import Block, Forward, Transformer

PadFn = Callable[[Array, int, int], Array]
BlockCall = Callable[[Array, BlockContext], tuple[Array, Aux]]  # as a `Block` is called


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys `[..., B, K, H, S]` and values `[..., B, K, S, H]` of each layer; token t of a row is at index t of S.

    Both of decoding's products then read the cache as it lies; with the heads inside, it was transposed every token.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @property
    def length(self) -> int:
        return self.keys[0].shape[-1]


# Names of the dims that keys and values agree on, rows first; the two within a head are never split.
CACHE_NAMES = ("rows", "kv_heads", "head_dim", "head_dim")


def init_cache(config: ModelConfig, num_layers: int, rows: tuple[int, ...], length: int, dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache of `num_layers` layers, with `rows` for its leading dims."""
    heads, size = (*rows, config.num_kv_heads), config.head_dim
    keys = tuple(jnp.zeros((*heads, size, length), dtype) for _ in range(num_layers))
    return KVCache(keys, tuple(jnp.zeros((*heads, length, size), dtype) for _ in range(num_layers)))


def pad_dim(x: Array, dim: int, length: int) -> Array:
    """Returns the array with zeros at the end of `dim`, counted from the last as -1, up to `length`."""
    more = (0, length - x.shape[dim])
    return jnp.pad(x, [more if i == x.ndim + dim else (0, 0) for i in range(x.ndim)])


def grow_cache(cache: KVCache, length: int, pad_fn: PadFn = pad_dim) -> KVCache:
    """Returns the cache with room for `length` tokens a row; `pad_fn`, called as `pad_dim`, makes one array each."""
    keys, values = (pad_fn(x, -1, length) for x in cache.keys), (pad_fn(x, -2, length) for x in cache.values)
    return KVCache(tuple(keys), tuple(values))


def write_rows(cache: KVCache, prompts: KVCache, sources: Array, slots: Array) -> KVCache:
    """Returns the cache with the rows `sources` `[R]` of `prompts` at `slots` `[R]`; a slot beyond the last is dropped.

    Prompts may be padded to more than the cache has room for, not longer.
    """
    length = min(prompts.length, cache.length)

    def write(x: Array, new: Array, dim: int) -> Array:
        at = (slots, *[slice(None)] * (x.ndim + dim - 1), slice(length))
        return x.at[at].set(jax.lax.slice_in_dim(new, 0, length, axis=dim)[sources], mode="drop")

    keys = (write(x, new, -1) for x, new in zip(cache.keys, prompts.keys))
    values = (write(x, new, -2) for x, new in zip(cache.values, prompts.values))
    return KVCache(tuple(keys), tuple(values))


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
    prompts = KVCache((), ())

    def attend_fn(q: Array, k: Array, v: Array, scoring: Scoring, sinks: Array | None) -> Array:
        nonlocal prompts
        keys, values = jnp.einsum("BSKH->BKHS", k), jnp.einsum("BSKH->BKSH", v)
        prompts = KVCache((*prompts.keys, keys), (*prompts.values, values))
        return forward.attention_fn(q, k, v, segment_ids, scoring, sinks)

    context = BlockContext(
        rotations={rope: rope_tables(rope, config.head_dim, positions) for rope in config.ropes},
        segment_ids=segment_ids,
        attend_fn=attend_fn,
        constrain=forward.constrain,
        products=forward.products,
    )
    for block in blocks:
        x, _ = block(x, context)
    return x, prompts


def decode(
    transformer: Transformer,
    blocks: Sequence[Block],
    cache: KVCache,
    tokens: Array,
    lengths: Array,
    decoding_fn: DecodingFn,
    forward: Forward,
) -> tuple[Array, KVCache]:
    """Returns the final hidden states `[B, D]` of one new token a row, and the cache with it.

    `tokens` `[B]` go to index `lengths` `[B]` of their rows; they see all tokens before them (within the window).
    """
    x = transformer.embed_tokens(tokens[:, None], lengths[:, None])
    x, cache = decode_blocks(transformer.config, blocks, cache, x, lengths, decoding_fn, forward)
    return transformer.read_out(x, forward.products)[:, 0], cache


def decode_blocks(
    config: ModelConfig,
    blocks: Sequence[BlockCall],
    cache: KVCache,
    x: Array,
    lengths: Array,
    decoding_fn: DecodingFn,
    forward: Forward,
) -> tuple[Array, KVCache]:
    """Returns the hidden states `[B, 1, D]` after some blocks of one new token a row, and the cache with it."""
    written = KVCache((), ())
    # Mapped over rows, the writes stay on the devices that hold them.
    write_key = jax.vmap(lambda row, new, at: row.at[:, :, at].set(new[0], mode="drop"))
    write_value = jax.vmap(lambda row, new, at: row.at[:, at].set(new[0], mode="drop"))

    def attend_fn(q: Array, k: Array, v: Array, scoring: Scoring, sinks: Array | None) -> Array:
        nonlocal written
        layer = len(written.keys)
        keys = write_key(cache.keys[layer], k, lengths)
        values = write_value(cache.values[layer], v, lengths)
        written = KVCache((*written.keys, keys), (*written.values, values))
        return decoding_fn(q[:, 0], keys, values, lengths, scoring, sinks)[:, None]

    context = BlockContext(
        rotations={rope: rope_tables(rope, config.head_dim, lengths[:, None]) for rope in config.ropes},
        segment_ids=jnp.ones(x.shape[:2], jnp.int32),
        attend_fn=attend_fn,
        constrain=forward.constrain,
        products=forward.products,
    )
    for block in blocks:
        x, _ = block(x, context)
    return x, written
