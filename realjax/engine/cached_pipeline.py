"""A model with its key-value cache, on P pipeline stages that are all busy: P waves of slots go round.

At tick t stage s works on wave (t - s) mod P, with its own layers and its own part of the cache. What the last stage
gives out at tick t is of wave (t + 1) mod P, which the first stage takes in at tick t + 1: a token is drawn in
between, and no stage waits. Embedding, head and draw are outside the stages, with the vocabulary split over all.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from realjax.core.axes import generate_rules, make_constrain, resolve_sharding
from realjax.core.compute import Compute
from realjax.core.layout import Layout
from realjax.core.trees import Tree
from realjax.engine.attention.cases import Case
from realjax.engine.attention.choose import make_attention, make_decoding
from realjax.engine.cached_model import Cache, Flight
from realjax.engine.manual_axes import hand_on, on_shards, over_stages, stage_index
from realjax.engine.products import make_products
from realjax.engine.rows import deal_rows, join_rows
from realjax.models.attention import BlockContext
from realjax.models.build import Model
from realjax.models.cache import (
    CACHE_NAMES,
    BlockCall,
    KVCache,
    NewTokens,
    PadFn,
    count_positions,
    decode_blocks,
    grow_cache,
    init_cache,
    prefill_blocks,
    write_rows,
)
from realjax.models.config import cut_order
from realjax.models.stacks import Aux, list_layers
from realjax.models.transformer import Block, Forward

FLIGHT_NAMES = ("layers", "rows", "time", "act_embed")
T = TypeVar("T")


class Stages:
    """P stages over the mesh axis `pipe`, each with L / P layers; the last ones may be empty.

    One cache for each tick of a round: at tick k stage s finds its wave, (k - s) mod P, in the k-th. Which cache a
    tick works on is thus the same for all stages and known beforehand. Each stage holds its part of the leading dim.
    """

    def __init__(self, model: Model, layout: Layout, compute: Compute) -> None:
        rules, config = generate_rules(layout.strategy), model.config
        self.model, self.layout, self.dtype = model, layout, compute.array_dtype
        self.num_waves = layout.strategy.pp
        self.stage_order = cut_order(config.order, self.num_waves)
        prompts, new_tokens = (Case.of(use, config, layout, self.dtype) for use in ("prefill", "decoding"))
        self.forward = Forward(
            attention_fn=make_attention(compute.attention, prompts, layout),
            constrain=make_constrain(rules, layout),
            products=make_products(rules, layout),
        )
        self.decoding_fn = make_decoding(compute.attention, new_tokens)
        shape = (self.num_waves, layout.strategy.dp, config.num_kv_heads, 1, 1)
        names = ("layers", *CACHE_NAMES)
        self.cache_sharding = resolve_sharding(names, shape, rules, layout, "cache")
        shape = (self.num_waves, layout.strategy.dp, 1, config.hidden_size)
        self.flight_sharding = resolve_sharding(FLIGHT_NAMES, shape, rules, layout, "flight")

    def split_layers(self, stack: Array) -> list[Array]:
        by_stage = stack.reshape(self.num_waves, -1, *stack.shape[1:])
        return [by_stage[:, layer] for layer in range(by_stage.shape[1])]

    def join_layers(self, by_kind: dict[str, Tree]) -> list[Tree]:
        """Returns a list of trees `[P, ...]`: the j-th holds layer j of every stage."""
        return list_layers(by_kind, self.stage_order, lambda parts, layer: parts[layer])

    def init_cache(self, num_slots: int, length: int) -> Cache:
        """Returns the empty caches of a round's ticks."""
        config, num_stages = self.model.config, self.num_waves
        rows = (num_stages, num_slots // num_stages)
        make = lambda: init_cache(config, self.stage_order, rows, length, self.dtype)
        return tuple(make() for _ in range(num_stages))

    def cache_length(self, cache: Cache) -> int:
        return cache[0].length

    def grow(self, cache: Cache, length: int, pad_fn: PadFn) -> Cache:
        return tuple(grow_cache(part, length, pad_fn) for part in cache)

    def init_flight(self, num_slots: int) -> Flight:
        """Returns hidden states `[P, B/P, 1, D]`, what each stage has received."""
        config, rows = self.model.config, num_slots // self.num_waves
        flight = jnp.zeros((self.num_waves, rows, 1, config.hidden_size), self.dtype)
        return (self.forward.constrain(flight, FLIGHT_NAMES),)

    def tick(
        self, params: Tree, cache: Cache, flight: Flight, wave: int, tokens: Array, slots: NewTokens
    ) -> tuple[Array, Cache, Flight, None]:
        """Each stage runs its layers on the wave it has; see `CachedModel.tick`."""
        transformer, blocks = self.model.bind_layers(params)
        graphdefs, num_stages, config = [*map(nnx.graphdef, blocks)], self.num_waves, self.model.config
        own_wave = lambda x: jnp.stack([x[:, (wave - stage) % num_stages] for stage in range(num_stages)])
        stage_rows = jax.tree.map(own_wave, slots)

        def stage(
            layers: list[Tree], cache: KVCache, received: Array, rows: NewTokens, new: Array
        ) -> tuple[Array, KVCache]:
            layers, cache, received, rows = _own((layers, cache, received, rows))
            x = jnp.where(stage_index() == 0, new, received)
            blocks = self._own_blocks(graphdefs, layers)
            x, cache = decode_blocks(config, blocks, cache, x, rows, self.decoding_fn, self.forward)
            return jax.tree.map(lambda y: y[None], (hand_on(x, num_stages, is_ring=True), cache))

        new = transformer.embed_tokens(tokens, slots.lengths[:, wave, None])
        run = over_stages(stage, self.layout, num_split=4)
        handed_on, mine = run(params["layers"], cache[wave], *flight, stage_rows, new)
        # What the last stage hands on comes round to the first, whose input is new: this is the way out.
        out = transformer.read_out(handed_on[0], self.forward.products)
        return out, (*cache[:wave], mine, *cache[wave + 1 :]), (handed_on,), None

    def admit(
        self, params: Tree, cache: Cache, tokens: Array, lengths: Array, sources: Array, places: Array
    ) -> tuple[Array, Cache, None]:
        """The prompts go through the stages in P micro-batches; see `CachedModel.admit`."""
        transformer, blocks = self.model.bind_layers(params)
        graphdefs, num_stages, config = [*map(nnx.graphdef, blocks)], self.num_waves, self.model.config

        def stage(layers: list[Tree], inputs: Array, lengths: Array) -> tuple[Array, KVCache]:
            index = stage_index()
            blocks = self._own_blocks(graphdefs, _own(layers))

            def tick(received: Array, t: Array) -> tuple[Array, tuple[Array, KVCache]]:
                turn = jnp.clip(t - index, 0, num_stages - 1)
                x = jnp.where(index == 0, inputs[turn], received)
                x, prompts = prefill_blocks(config, blocks, x, lengths[turn], self.forward)
                last = jnp.take_along_axis(x, (lengths[turn] - 1)[:, None, None], axis=1)
                return hand_on(x, num_stages, is_ring=True), (last, prompts)

            _, outputs = jax.lax.scan(tick, jnp.zeros_like(inputs[0]), jnp.arange(2 * num_stages - 1))
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, num_stages)[None], outputs)

        x = transformer.embed_tokens(tokens, count_positions(tokens), constrain=self.forward.constrain)
        run = over_stages(stage, self.layout, num_split=1)
        # Back from micro-batches to the order of the prompts, for each stage.
        last, prompts = jax.vmap(join_rows)(run(params["layers"], *deal_rows((x, lengths), num_stages)))
        write = on_shards(self._write_prompts, self.cache_sharding, num_caches=2)
        return transformer.read_out(last[-1], self.forward.products)[:, 0], write(cache, prompts, sources, places), None

    def _write_prompts(self, caches: Cache, prompts: KVCache, sources: Array, places: Array) -> Cache:
        """Returns a device's own caches with its prompts in them, see the class for which holds what."""
        caches, prompts = _own((caches, prompts))
        # A device has as many slots of each wave, one after the other.
        wave, row, num_rows = places % self.num_waves, places // self.num_waves, caches[0].keys[0].shape[0]
        tick = (wave + stage_index()) % self.num_waves
        rows = [jnp.where(tick == i, row, num_rows) for i in range(self.num_waves)]
        written = tuple(write_rows(cache, prompts, sources, at) for cache, at in zip(caches, rows))
        return jax.tree.map(lambda x: x[None], written)

    def _own_blocks(self, graphdefs: Sequence[nnx.GraphDef[Block]], layers: Sequence[Tree]) -> list[BlockCall]:
        """Returns a stage's blocks; where a stage has an empty layer, its block hands on what it gets."""
        first = stage_index() * len(layers)

        def make(number: int, block: Block) -> BlockCall:
            if (self.num_waves - 1) * len(layers) + number < self.model.config.num_layers:
                return block  # a layer of the model in every stage

            def skipping(x: Array, context: BlockContext) -> tuple[Array, Aux]:
                y, terms = block(x, context)
                return jnp.where(first + number < self.model.config.num_layers, y, x), terms

            return skipping

        return [make(number, nnx.merge(*parts)) for number, parts in enumerate(zip(graphdefs, layers))]


def _own(tree: T) -> T:
    """Returns a stage's own part of arrays split over the stages."""
    return jax.tree.map(lambda x: x[0], tree)
