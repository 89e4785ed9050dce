"""A model with its key-value cache, on one stage: parameters made ready, prompts taken in, new tokens decoded."""

from dataclasses import replace
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from realjax.core.axes import generate_rules, make_constrain, resolve_sharding
from realjax.core.compute import Compute
from realjax.core.layout import Layout
from realjax.core.routes import Routes
from realjax.core.trees import Tree
from realjax.engine.attention.cases import Case
from realjax.engine.attention.choose import make_attention, make_decoding
from realjax.engine.manual_axes import on_shards
from realjax.engine.products import make_products
from realjax.models.build import Model
from realjax.models.cache import (
    CACHE_NAMES,
    KVCache,
    NewTokens,
    PadFn,
    decode,
    grow_cache,
    init_cache,
    prefill,
    write_rows,
)
from realjax.models.stacks import list_layers
from realjax.models.transformer import Forward

# One cache for each tick of a round.
Cache = tuple[KVCache, ...]
# What is between the stages: hidden states, or nothing where there is one stage.
Flight = tuple[Array, ...]


class CachedModel(Protocol):
    """What a layout decides about decoding. Slots form `num_waves` waves, slot b in wave b mod num_waves: a tick
    takes one wave's new tokens in and gives another's hidden states out.
    """

    num_waves: int
    dtype: jnp.dtype
    cache_sharding: NamedSharding
    flight_sharding: NamedSharding
    forward: Forward

    def split_layers(self, stack: Array) -> list[Array]:
        """Returns a leaf of a kind's stack of layers as parts, see `join_layers`."""
        ...

    def join_layers(self, by_kind: dict[str, Tree]) -> list[Tree]:
        """Returns `layers` in the form that the other functions take, of trees of what `split_layers` returned."""
        ...

    def init_cache(self, num_slots: int, length: int) -> Cache:
        """Returns an empty cache."""
        ...

    def cache_length(self, cache: Cache) -> int:
        """Returns the tokens a slot has room for."""
        ...

    def grow(self, cache: Cache, length: int, pad_fn: PadFn) -> Cache:
        """Returns the cache with room for `length` tokens a slot, padded array by array."""
        ...

    def admit(
        self, params: Tree, cache: Cache, tokens: Array, lengths: Array, sources: Array, places: Array
    ) -> tuple[Array, Cache, Array | None]:
        """Returns the last hidden states `[P, D]` of prompts `[P, T]`, the cache with prompt `sources` `[R]` in the
        slots `places` `[R]`, and the experts of the prompts' tokens `[P, T, W]` where they are recorded. Both are
        counted within a device's own part along `data`: no prompt leaves its device.

        A place beyond the last slot is dropped.
        """
        ...

    def init_flight(self, num_slots: int) -> Flight:
        """Returns the arrays between the stages before the first tick; their values are not used."""
        ...

    def tick(
        self, params: Tree, cache: Cache, flight: Flight, wave: int, tokens: Array, slots: NewTokens
    ) -> tuple[Array, Cache, Flight, Array | None]:
        """Takes in `tokens` `[B/W, T]` of `wave`, one a row where there are several; `slots` `[B/W, W]` are of all.

        Returns the hidden states `[B/W, T, D]` of wave `(wave + 1) % num_waves`, the cache, what is in flight, and the
        experts of the tokens `[B/W, T, W]`, where they are recorded.
        """
        ...


class OneStage:
    """The whole model in one stage: a single wave, whose tokens come out in the tick that they go in."""

    num_waves = 1

    def __init__(self, model: Model, layout: Layout, compute: Compute, *, records_routes: bool = False) -> None:
        self.records_routes = records_routes
        rules, config = generate_rules(layout.strategy), model.config
        self.model, self.dtype = model, compute.array_dtype
        prompts, new_tokens = (Case.of(use, config, layout, self.dtype) for use in ("prefill", "decoding"))
        self.forward = Forward(
            attention_fn=make_attention(compute.attention, prompts, layout),
            constrain=make_constrain(rules, layout),
            products=make_products(rules, layout),
        )
        self.decoding_fn = make_decoding(compute.attention, new_tokens)
        shape = (layout.strategy.dp, config.num_kv_heads, 1, 1)
        self.cache_sharding = resolve_sharding(CACHE_NAMES, shape, rules, layout, "cache")
        self.flight_sharding = layout.replicated  # there is nothing to place

    def split_layers(self, stack: Array) -> list[Array]:
        return list(stack)

    def join_layers(self, by_kind: dict[str, Tree]) -> list[Tree]:
        config = self.model.config
        return list_layers(by_kind, config.order[: config.num_layers], lambda parts, layer: parts[layer])

    def init_cache(self, num_slots: int, length: int) -> Cache:
        config = self.model.config
        return (init_cache(config, config.order[: config.num_layers], (num_slots,), length, self.dtype),)

    def cache_length(self, cache: Cache) -> int:
        return cache[0].length

    def grow(self, cache: Cache, length: int, pad_fn: PadFn) -> Cache:
        return (grow_cache(cache[0], length, pad_fn),)

    def admit(
        self, params: Tree, cache: Cache, tokens: Array, lengths: Array, sources: Array, places: Array
    ) -> tuple[Array, Cache, Array | None]:
        """Whole prompts at once; see `CachedModel.admit`."""
        transformer, blocks = self.model.bind_layers(params)
        recorder = self._make_recorder()
        hidden, prompts = prefill(transformer, blocks, tokens, lengths, recorder.watch(self.forward))
        write = on_shards(write_rows, self.cache_sharding, num_caches=2)
        return hidden, (write(cache[0], prompts, sources, places),), recorder.words()

    def init_flight(self, num_slots: int) -> Flight:
        return ()

    def tick(
        self, params: Tree, cache: Cache, flight: Flight, wave: int, tokens: Array, slots: NewTokens
    ) -> tuple[Array, Cache, Flight, Array | None]:
        """The only wave's tokens, in and out; see `CachedModel.tick`."""
        transformer, blocks = self.model.bind_layers(params)
        rows, recorder = jax.tree.map(lambda x: x[:, 0], slots), self._make_recorder()
        forward = recorder.watch(self.forward)
        hidden, written = decode(transformer, blocks, cache[0], tokens, rows, self.decoding_fn, forward)
        return hidden, (written,), flight, recorder.words()

    def _make_recorder(self) -> "Recorder":
        return Recorder(self.model.config.routes if self.records_routes else None)


class Recorder:
    """What a pass of the blocks, one after another, sends tokens to; nothing where `form` is None."""

    def __init__(self, form: Routes | None) -> None:
        self.form, self._layers = form, list[Array]()

    def watch(self, forward: Forward) -> Forward:
        """Returns how a pass runs that is recorded."""
        return forward if self.form is None else replace(forward, route_fn=self._add)

    def words(self) -> Array | None:
        """Returns the experts of the tokens `[B, T, W]` in all layers."""
        return None if self.form is None else self.form.pack(jnp.stack(self._layers, axis=2))

    def _add(self, ids: Array) -> Array:
        self._layers.append(ids)
        return ids
