"""The model as the sampler uses it, on P pipeline stages that are all busy: P groups of slots go round.

At tick t stage s works on group (t - s) mod P, with its own layers and its own part of the cache. What the last stage
gives out at tick t is of group (t + 1) mod P, which the first stage takes in at tick t + 1: a token is drawn in
between, and no stage waits. Embedding, head and draw are outside the stages, with the vocabulary split over all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from realjax.core.axes import Constrain, generate_rules, make_constrain, resolve
from realjax.core.layout import Layout
from realjax.core.trees import Tree
from realjax.engine.decoder import CACHE_NAMES
from realjax.engine.forward import ForwardOptions, make_compute_copy
from realjax.models.attention import AttentionFn, make_attention, masked_attention
from realjax.models.build import Model
from realjax.models.cache import KVCache
from realjax.models.config import ModelConfig
from realjax.models.layers import rope_tables
from realjax.models.transformer import Block

# One cache for each tick of a round: at tick k stage s finds its group, (k - s) mod P, in the k-th. Which cache a tick
# works on is thus the same for all stages and known beforehand. Each stage holds its part of the leading dim, the pipe.
StageCaches = tuple[KVCache, ...]


class Stages:
    """P stages over the mesh axis `pipe`, each with L / P layers."""

    def __init__(self, model: Model, layout: Layout, options: ForwardOptions) -> None:
        rules, config = generate_rules(layout.strategy), model.config
        self.model, self.layout, self.dtype = model, layout, options.precision.dtype
        self.num_groups = layout.strategy.pp
        self.compute_copy = make_compute_copy(model, rules, layout, options.precision)
        self.constrain = make_constrain(rules, layout)
        self.attention_fn = make_attention(options.attention, layout.strategy.tp)
        shape = (self.num_groups, layout.strategy.dp, 1, config.num_kv_heads, config.head_dim)
        self.cache_sharding = NamedSharding(
            layout.mesh, resolve(("layers", *CACHE_NAMES), shape, rules, layout, "cache")
        )

    def prepare(self, params: Tree) -> Tree:
        """Returns `layers` as a list of trees `[P, ...]`: the j-th holds layer j of every stage."""
        params = self.compute_copy(params)
        by_stage = jax.tree.map(lambda x: x.reshape(self.num_groups, -1, *x.shape[1:]), params["layers"])
        take = lambda layer: jax.tree.map(lambda x: x[:, layer], by_stage)
        return {**params, "layers": [take(layer) for layer in range(self.model.config.num_layers // self.num_groups)]}

    def init_cache(self, num_slots: int, length: int) -> StageCaches:
        config = self.model.config
        shape = (self.num_groups, num_slots // self.num_groups, length, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers // self.num_groups)
        zeros = lambda: tuple(jnp.zeros(shape, self.dtype) for _ in layers)
        return tuple(KVCache(zeros(), zeros()) for _ in range(self.num_groups))

    def cache_length(self, cache: StageCaches) -> int:
        return cache[0].keys[0].shape[2]

    def grow(self, cache: StageCaches, length: int) -> StageCaches:
        longer = ((0, 0), (0, 0), (0, length - self.cache_length(cache)), (0, 0), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x, longer), cache)

    def init_flight(self, num_slots: int) -> Array:
        """Returns hidden states `[P, B/P, 1, D]`, what each stage has received."""
        config, rows = self.model.config, num_slots // self.num_groups
        flight = jnp.zeros((self.num_groups, rows, 1, config.hidden_size), self.dtype)
        return self.constrain(flight, ("layers", "rows", "time", "act_embed"))

    def tick(
        self, params: Tree, cache: StageCaches, flight: Array, group: int, tokens: Array, lengths: Array
    ) -> tuple[Array, StageCaches, Array]:
        transformer, blocks = self.model.bind_layers(params)
        graphdef, num_stages, config = nnx.graphdef(blocks[0]), self.num_groups, self.model.config
        stage_lengths = jnp.stack([lengths[:, (group - stage) % num_stages] for stage in range(num_stages)])

        def stage(layers: Any, cache: KVCache, received: Array, lengths: Array, new: Array) -> tuple[Array, KVCache]:
            layers, cache, received, lengths = _own((layers, cache, received, lengths))
            x = jnp.where(jax.lax.axis_index("pipe") == 0, new, received)
            blocks = [nnx.merge(graphdef, layer) for layer in layers]
            x, cache = decode_blocks(config, blocks, cache, x, lengths, self.constrain)
            return jax.tree.map(lambda y: y[None], (self._hand_on(x), cache))

        new = transformer.embed(tokens[:, None])
        run = self._by_stage(stage, num_split=4)
        flight, mine = run(params["layers"], cache[group], flight, stage_lengths, new)
        # What the last stage hands on comes round to the first, whose input is new: this is the way out.
        return transformer.norm(flight[0])[:, 0], (*cache[:group], mine, *cache[group + 1 :]), flight

    def admit(
        self, params: Tree, cache: StageCaches, tokens: Array, lengths: Array, places: Array
    ) -> tuple[Array, StageCaches]:
        transformer, blocks = self.model.bind_layers(params)
        graphdef, num_stages, config = nnx.graphdef(blocks[0]), self.num_groups, self.model.config

        def split(rows: Array) -> Array:
            # Rows are dealt out in turn, so that each stays on its own device of the data axis.
            return jnp.moveaxis(rows.reshape(-1, num_stages, *rows.shape[1:]), 1, 0)

        def stage(layers: Any, inputs: Array, lengths: Array) -> tuple[Array, KVCache]:
            index = jax.lax.axis_index("pipe")
            blocks = [nnx.merge(graphdef, layer) for layer in _own(layers)]

            def tick(received: Array, t: Array) -> tuple[Array, tuple[Array, KVCache]]:
                turn = jnp.clip(t - index, 0, num_stages - 1)
                x = jnp.where(index == 0, inputs[turn], received)
                x, prompts = prefill_blocks(config, blocks, x, lengths[turn], self.attention_fn, self.constrain)
                last = jnp.take_along_axis(x, (lengths[turn] - 1)[:, None, None], axis=1)
                return self._hand_on(x), (last, prompts)

            _, outputs = jax.lax.scan(tick, jnp.zeros_like(inputs[0]), jnp.arange(2 * num_stages - 1))
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, num_stages)[None], outputs)

        x = self.constrain(transformer.embed(tokens), ("rows", "time", "act_embed"))
        outputs = self._by_stage(stage, num_split=1)(params["layers"], split(x), split(lengths))
        # Back from micro-batches to the order of the prompts: `[P, P, A/P, ...]` -> `[P, A, ...]`.
        join = lambda x: jnp.moveaxis(x, 1, 2).reshape(num_stages, -1, *x.shape[3:])
        last, prompts = jax.tree.map(join, outputs)
        return transformer.norm(last[-1])[:, 0], self._write_prompts(cache, prompts, places)

    def _write_prompts(self, caches: StageCaches, prompts: KVCache, slots: Array) -> StageCaches:
        """Returns the caches with the prompts' rows at `slots`, see `StageCaches` for which holds what."""
        num_stages, spec = self.num_groups, self.cache_sharding.spec
        group, row = slots % num_stages, slots // num_stages

        def write(caches: StageCaches, prompts: KVCache, group: Array, row: Array) -> StageCaches:
            num_rows = caches[0].keys[0].shape[1]
            row -= jax.lax.axis_index("data") * num_rows
            tick = (group + jax.lax.axis_index("pipe")) % num_stages

            def write_tick(whole: Array, rows: Array, at: Array) -> Array:
                return whole.at[0, at, : rows.shape[2]].set(rows[0], mode="drop")

            written = []
            for i, cache in enumerate(caches):
                at = jnp.where((tick == i) & (row >= 0) & (row < num_rows), row, num_rows)
                written.append(jax.tree.map(lambda whole, rows, at=at: write_tick(whole, rows, at), cache, prompts))
            return tuple(written)

        # Each device has all prompts and writes those of its own slots.
        of_prompts = PartitionSpec(*(None if axis == "data" else axis for axis in spec))
        in_specs = (spec, of_prompts, PartitionSpec(), PartitionSpec())
        run = jax.shard_map(write, mesh=self.layout.mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
        return run(caches, prompts, group, row)

    def _by_stage(self, stage: Callable[..., Any], num_split: int) -> Callable[..., Any]:
        """Returns `stage` over the pipe axis; the first `num_split` arguments are split on their leading dim."""
        by_stage, whole = PartitionSpec("pipe"), PartitionSpec()

        def run(*args: Any) -> Any:
            specs = tuple(by_stage if i < num_split else whole for i in range(len(args)))
            mapped = jax.shard_map(
                stage,
                mesh=self.layout.mesh,
                in_specs=specs,
                out_specs=by_stage,
                axis_names={"pipe"},
                check_vma=False,
            )
            return mapped(*args)

        return run

    def _hand_on(self, x: Array) -> Array:
        return jax.lax.ppermute(x, "pipe", [(i, (i + 1) % self.num_groups) for i in range(self.num_groups)])


def _own(tree: Any) -> Any:
    """Returns a stage's own part of arrays split over the stages."""
    return jax.tree.map(lambda x: x[0], tree)


def prefill_blocks(
    config: ModelConfig,
    blocks: Sequence[Block],
    x: Array,
    lengths: Array,
    attention_fn: AttentionFn,
    constrain: Constrain,
) -> tuple[Array, KVCache]:
    """Returns the hidden states `[B, T, D]` after some blocks of prompts padded on the right, and their cache."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    cos, sin = rope_tables(config.rope, config.head_dim, positions)
    prompts = KVCache((), ())

    def attend_fn(q: Array, k: Array, v: Array) -> Array:
        nonlocal prompts
        prompts = KVCache((*prompts.keys, k), (*prompts.values, v))
        return attention_fn(q, k, v, segment_ids, config.sliding_window)

    for block in blocks:
        x = block(x, cos, sin, attend_fn, constrain)
    return x, prompts


def decode_blocks(
    config: ModelConfig, blocks: Sequence[Block], cache: KVCache, x: Array, lengths: Array, constrain: Constrain
) -> tuple[Array, KVCache]:
    """Returns the hidden states `[B, 1, D]` after some blocks of one new token a row, and the cache with it."""
    cos, sin = rope_tables(config.rope, config.head_dim, lengths[:, None])
    index = jnp.arange(cache.length)[None]
    mask = index <= lengths[:, None]
    if config.sliding_window is not None:
        mask &= index > lengths[:, None] - config.sliding_window
    written = KVCache((), ())
    # Mapped over rows, the write stays on the devices that hold them.
    write = jax.vmap(lambda row, new, at: row.at[at].set(new[0], mode="drop"))

    def attend_fn(q: Array, k: Array, v: Array) -> Array:
        nonlocal written
        layer = len(written.keys)
        keys, values = (write(whole, new, lengths) for whole, new in ((cache.keys[layer], k), (cache.values[layer], v)))
        written = KVCache((*written.keys, keys), (*written.values, values))
        return masked_attention(q, keys, values, mask[:, None])

    for block in blocks:
        x = block(x, cos, sin, attend_fn, constrain)
    return x, written
