"""The key-value cache, and the two uses of the blocks that fill and read it: whole prompts, and one token a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import Constrain
from realjax.models.attention import AttentionFn, masked_attention
from realjax.models.config import ModelConfig
from realjax.models.layers import rope_tables
from realjax.models.transformer import Block, Transformer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of each layer, `[B, S, K, H]` for B rows of up to S tokens; token t of a row is at index t."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]


def init_cache(config: ModelConfig, num_rows: int, length: int, dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache."""
    shape = (num_rows, length, config.num_kv_heads, config.head_dim)
    layers = range(config.num_layers)
    return KVCache(tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers))


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """Returns the cache with room for `length` tokens a row."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))), cache)


def write_rows(cache: KVCache, prompts: KVCache, slots: Array) -> KVCache:
    """Returns the cache with the rows of `prompts` at `slots`; a slot beyond the last row is dropped."""

    def write(whole: Array, rows: Array) -> Array:
        return whole.at[slots, : rows.shape[1]].set(rows, mode="drop")

    return jax.tree.map(write, cache, prompts)


def prefill(
    transformer: Transformer,
    blocks: Sequence[Block],
    tokens: Array,
    lengths: Array,
    attention_fn: AttentionFn,
    constrain: Constrain,
) -> tuple[Array, KVCache]:
    """Returns the final hidden state of each prompt's last token `[B, D]`, and the cache of the prompts.

    `tokens` `[B, T]` are padded on the right, `lengths` `[B]` says where.
    """
    config = transformer.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    cos, sin = rope_tables(config.rope, config.head_dim, positions)
    keys: list[Array] = []
    values: list[Array] = []

    def attend_fn(q: Array, k: Array, v: Array) -> Array:
        keys.append(k)
        values.append(v)
        return attention_fn(q, k, v, segment_ids, config.sliding_window)

    x = constrain(transformer.embed(tokens), ("rows", "time", "act_embed"))
    for block in blocks:
        x = block(x, cos, sin, attend_fn, constrain)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return transformer.norm(last)[:, 0], KVCache(tuple(keys), tuple(values))


def decode(
    transformer: Transformer,
    blocks: Sequence[Block],
    cache: KVCache,
    tokens: Array,
    lengths: Array,
    constrain: Constrain,
) -> tuple[Array, KVCache]:
    """Returns the final hidden states `[B, D]` of one new token a row, and the cache with it.

    `tokens` `[B]` go to index `lengths` `[B]` of their rows; they see all tokens before them (within the window).
    """
    config = transformer.config
    cos, sin = rope_tables(config.rope, config.head_dim, lengths[:, None])
    rows, index = jnp.arange(tokens.shape[0]), jnp.arange(cache.length)[None]
    mask = index <= lengths[:, None]
    if config.sliding_window is not None:
        mask &= index > lengths[:, None] - config.sliding_window
    keys: list[Array] = []
    values: list[Array] = []

    def attend_fn(q: Array, k: Array, v: Array) -> Array:
        layer = len(keys)
        keys.append(cache.keys[layer].at[rows, lengths].set(k[:, 0], mode="drop"))
        values.append(cache.values[layer].at[rows, lengths].set(v[:, 0], mode="drop"))
        return masked_attention(q, keys[-1], values[-1], mask[:, None])

    x = transformer.embed(tokens[:, None])
    for block in blocks:
        x = block(x, cos, sin, attend_fn, constrain)
    return transformer.norm(x)[:, 0], KVCache(tuple(keys), tuple(values))
