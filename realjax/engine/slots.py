"""Decoding in static shapes: a fixed number of slots, each with a row that is being continued, or free.

Two programs, each compiled once per bucket of lengths: `admit` runs a few prompts and writes them into slots, `decode`
draws a chunk of tokens for all slots in one device loop. `batching` decides which row is in which slot. The cached
model says how the layers are spread over devices. A sequence-parallel flag has no effect: one token a row is no
sequence to split.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from realjax.core.axes import generate_rules, resolve_sharding, tree_shardings
from realjax.core.compute import Compute
from realjax.core.layout import Layout
from realjax.core.trees import Tree, flatten_paths, map_paths
from realjax.engine.cached_model import CachedModel, OneStage
from realjax.engine.cached_pipeline import Stages
from realjax.engine.compiled import Compiled, CompileLog, place_array
from realjax.engine.lookup import Lookup
from realjax.engine.manual_axes import share_rows
from realjax.engine.rows import put_rows, take_rows
from realjax.engine.sampling import Drawn, Sampler
from realjax.engine.slot_arrays import CHUNK_LEN, Chunk, Prompts, Slots
from realjax.models.build import Model
from realjax.models.cache import NewTokens, pad_dim
from realjax.models.config import find_lookup_fault
from realjax.models.stacks import split_kinds

T = TypeVar("T")


class SlotPrograms:
    """The programs that continue rows in `num_slots` slots on one layout, compiled when they first run."""

    def __init__(
        self,
        model: Model,
        layout: Layout,
        sampler: Sampler,
        num_slots: int,
        compute: Compute,
        log: CompileLog | None = None,
        *,
        records_routes: bool = False,
    ) -> None:
        """Raises ValueError for a layout or a number of slots that does not divide, a model with a scalar head, or a
        lookup of tokens that cannot be.

        `records_routes`: the experts that tokens go to are recorded, on one pipeline stage.
        """
        if model.config.is_critic:
            raise ValueError("generate: the model has a scalar head; generation needs a language model's")
        rules, self.lookup = generate_rules(layout.strategy), Lookup.of(sampler.config)
        if self.lookup and (fault := find_lookup_fault(model.config, self.lookup.num_tokens, layout.strategy.pp)):
            raise ValueError(f"generate: {fault}")
        self._shardings = flatten_paths(tree_shardings(model.axes, model.abstract, rules, layout))
        self.cached: CachedModel = (
            OneStage(model, layout, compute, records_routes=records_routes)
            if layout.strategy.pp == 1
            else Stages(model, layout, compute)
        )
        self.routes = model.config.routes if records_routes else None
        multiple = layout.strategy.row_multiple
        if num_slots % multiple:
            raise ValueError(
                f"generate: {num_slots} slots do not divide over dp={layout.strategy.dp} and pp={layout.strategy.pp}; "
                f"use a multiple of {multiple}"
            )
        self.model, self.layout, self.sampler, self.num_slots = model, layout, sampler, num_slots
        # Rows admitted at once: enough to keep the devices busy, few enough that free slots do not wait.
        self.num_admitted = max(multiple, num_slots // 4 // multiple * multiple)
        self._rows = resolve_sharding(("rows",), (num_slots,), rules, layout, "slots")
        self._make_programs(log or CompileLog())

    def _make_programs(self, log: CompileLog) -> None:
        whole = self.layout.replicated
        places: dict[str, Any] = {field.name: self._rows for field in fields(Slots)}
        places |= {"cache": self.cached.cache_sharding, "flight": self.cached.flight_sharding, "is_full": whole}
        slots = Slots(**places)
        self.places: Any = slots  # where the arrays of slots lie
        self._prepare = jax.jit(self._make_leaf, static_argnums=(1, 2))
        self._start = jax.jit(self._empty_slots, static_argnums=(0, 1), out_shardings=slots)
        out = {"out_shardings": (slots, whole), "donate_argnums": 1}
        self._admit = Compiled(f"{log.call}: admit", self._admit_prompts, log, **out)
        self._decode = Compiled(f"{log.call}: decode", self._decode_slots, log, **out)
        self._pad = jax.jit(pad_dim, static_argnums=(1, 2), out_shardings=self.cached.cache_sharding)
        self._pad_texts = jax.jit(pad_dim, static_argnums=(1, 2), out_shardings=self._rows)
        self._stop = jax.jit(self._stop_rows, donate_argnums=0, out_shardings=slots)

    @property
    def device_bytes(self) -> int:
        """What the larger of the two programs took of a device when it ran last."""
        return max(self._admit.device_bytes, self._decode.device_bytes)

    def prepare(self, params: Tree) -> Tree:
        """Returns the parameters in the form that `admit` and `decode` take; in that form, returns them themselves."""
        return params if isinstance(params["layers"], list) else self.join(map_paths(self.prepare_leaf, params))

    def prepare_leaf(self, path: str, leaf: Array) -> Array | list[Array]:
        """Returns the parameter at a path in the compute dtype, of a stack of layers a list of parts, for `join`."""
        if self._is_ready(path, leaf):
            return leaf
        # Cast where it lies: what ZeRO gathers from its shards is then half as many bytes in bf16.
        return self._prepare(leaf.astype(self._find_dtype(path)), self._shardings[path], _is_stack(path))

    def join(self, leaves: Tree) -> Tree:
        """Returns the parameters as `prepare` does, of the tree of what `prepare_leaf` returned."""
        by_kind = split_kinds(self.model.config, leaves["layers"])
        return {**leaves, "layers": self.cached.join_layers(by_kind)}

    def list_places(self) -> Tree:
        """Returns where parameters lie in the form that `prepare` gives them, on one pipeline stage."""

        def one(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding | list[NamedSharding]:
            place = self._shardings[path]
            of_layer = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
            return [of_layer] * leaf.shape[0] if _is_stack(path) else place

        return self.join(map_paths(one, self.model.abstract))

    def start(self, length: int, has_greedy: bool) -> Slots:
        """Returns free slots with room for `length` tokens each; `has_greedy`: some rows may differ from the options in
        being greedy.
        """
        return self._start(length, has_greedy and not self.sampler.config.greedy)

    def cache_length(self, slots: Slots) -> int:
        """Returns the tokens a slot has room for."""
        return self.cached.cache_length(slots.cache)

    def grow(self, slots: Slots, length: int) -> Slots:
        """Returns the slots, which are given up, with room for `length` tokens each.

        Two sizes cannot be one buffer. Array by array, the old cache goes as the new one comes.
        """

        def pad(x: Array, dim: int, length: int) -> Array:
            grown = self._pad(x, dim, length)
            x.delete()  # its memory is free when the copy has been made
            return grown

        is_full = place_array(np.array(False), self.layout.replicated)
        texts = None if slots.texts is None else self._pad_texts(slots.texts, -1, length)
        return replace(slots, cache=self.cached.grow(slots.cache, length, pad), is_full=is_full, texts=texts)

    def allow_greedy(self, slots: Slots) -> Slots:
        """Returns the slots where rows may be greedy that are put in from now on."""
        if slots.is_greedy is not None or self.sampler.config.greedy:
            return slots
        return replace(slots, is_greedy=place_array(np.zeros(self.num_slots, np.bool_), self._rows))

    def admit(self, params: Tree, slots: Slots, prompts: Prompts[np.ndarray]) -> tuple[Slots, Chunk[Array]]:
        """Returns the slots, which are donated, with the prompts put in, and the next token of each."""
        return self._admit(params, slots, jax.tree.map(self._put, prompts))

    def decode(self, params: Tree, slots: Slots, stop_at: int, num_rounds: int) -> tuple[Slots, Chunk[Array]]:
        """Returns the slots, which are donated, after up to `num_rounds` tokens more, and the tokens.

        It ends early when no more than `stop_at` rows are running, or one of them has no room left in its cache.
        """
        return self._decode(params, slots, self._put(np.array([stop_at, num_rounds], np.int32)))

    def stop(self, slots: Slots, is_stopped: np.ndarray) -> Slots:
        """Returns the slots, which are donated, with the rows `is_stopped` `[B]` ended."""
        return self._stop(slots, self._put(is_stopped))

    def abstract_params(self, params: Tree, compile_fn: Callable[[jax.stages.Lowered], jax.stages.Compiled]) -> Tree:
        """Returns what `prepare` does for shapes with shardings; `compile_fn` compiles for where the results lie."""

        def one(path: str, leaf: Any) -> Any:
            if self._is_ready(path, leaf):
                return leaf
            leaf = jax.ShapeDtypeStruct(leaf.shape, self._find_dtype(path), sharding=leaf.sharding)
            made = compile_fn(self._prepare.lower(leaf, self._shardings[path], _is_stack(path))).out_info
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), made)

        return self.join(map_paths(one, params))

    def lower(
        self, params: Tree, length: int, prompts: Prompts[np.ndarray] | None, *, has_greedy: bool
    ) -> dict[str, jax.stages.Lowered]:
        """Returns the programs `admit` and `decode` by name, for `abstract_params`, such prompts and `length` tokens a
        slot; without prompts the second alone.
        """
        slots = self._start.eval_shape(length, has_greedy and not self.sampler.config.greedy)
        whole = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.layout.replicated)
        admit = {} if prompts is None else {"admit": self._admit.lower(params, slots, jax.tree.map(whole, prompts))}
        return {**admit, "decode": self._decode.lower(params, slots, whole(np.zeros(2, np.int32)))}

    def _put(self, array: np.ndarray) -> Array:
        return place_array(array, self.layout.replicated)

    def _is_ready(self, path: str, leaf: Array) -> bool:
        return not _is_stack(path) and leaf.dtype == self._find_dtype(path) and leaf.sharding == self._shardings[path]

    def _find_dtype(self, path: str) -> np.dtype:
        return self.model.copy_dtype(path, self.cached.dtype)

    def _make_leaf(self, leaf: Array, sharding: NamedSharding, is_stack: bool) -> Array | list[Array]:
        copy = jax.lax.with_sharding_constraint(leaf, sharding)
        return self.cached.split_layers(copy) if is_stack else copy

    def _empty_slots(self, length: int, has_greedy: bool) -> Slots:
        zeros = jnp.zeros(self.num_slots, jnp.int32)
        return Slots(
            cache=self.cached.init_cache(self.num_slots, length),
            flight=self.cached.init_flight(self.num_slots),
            is_full=jnp.array(False),
            lengths=zeros,
            last_tokens=zeros,
            num_generated=zeros,
            is_running=zeros > 0,
            keys=self.sampler.make_keys(zeros, zeros),
            is_greedy=zeros > 0 if has_greedy else None,
            texts=jnp.zeros((self.num_slots, length), jnp.int32) if self.lookup else None,
        )

    def _stop_rows(self, slots: Slots, is_stopped: Array) -> Slots:
        return replace(slots, is_running=slots.is_running & ~is_stopped)

    def _admit_prompts(self, params: Tree, slots: Slots, prompts: Prompts[Array]) -> tuple[Slots, Chunk[Array]]:
        # Only tokens have come to all devices: each along `data` runs its own prompts and fills its own slots.
        prompts, num_before = jax.lax.with_sharding_constraint(prompts, self._rows), prompts.num_generated
        sources, places, num_parts = prompts.sources, prompts.places, self.layout.strategy.dp
        hidden, cache, routes = self.cached.admit(params, slots.cache, prompts.tokens, prompts.lengths, sources, places)
        hidden, lengths, routes = take_rows((hidden, prompts.lengths, routes), sources, num_parts)
        keys = self.sampler.make_keys(prompts.row_ids, prompts.sample_ids)
        is_greedy = None if slots.is_greedy is None else prompts.is_greedy
        drawn = self._draw(params, hidden, keys, num_before, is_greedy)
        is_running = ~self.sampler.has_ended(drawn.tokens, num_before + 1)

        def put(whole: T, part: T) -> T:
            return put_rows(whole, part, places, num_parts)

        texts = None
        if slots.texts is not None:
            room = slots.texts.shape[1]
            of_prompts = take_rows(pad_dim(prompts.tokens[:, :room], -1, room), sources, num_parts)
            texts = put(slots.texts, of_prompts)
        slots = Slots(
            cache=cache,
            flight=slots.flight,
            is_full=jnp.array(False),
            lengths=put(slots.lengths, lengths),
            last_tokens=put(slots.last_tokens, drawn.tokens),
            num_generated=put(slots.num_generated, num_before + 1),
            is_running=put(slots.is_running, is_running),
            keys=put(slots.keys, keys),
            is_greedy=put(slots.is_greedy, is_greedy),
            texts=texts,
        )
        drawn = jax.tree.map(lambda x: x[:, None], drawn)
        return slots, Chunk(drawn, jnp.ones_like(num_before), is_running, jnp.array(0, jnp.int32), routes)

    def _decode_slots(self, params: Tree, slots: Slots, limits: Array) -> tuple[Slots, Chunk[Array]]:
        stop_at, num_rounds = limits

        def go_on(carry: tuple[Slots, Chunk[Array]]) -> Array:
            slots, chunk = carry
            has_room = slots.lengths < self.cache_length(slots)
            if self.lookup:
                has_room &= chunk.counts < num_rounds
            # One sum over the devices, not two: each round waits for it.
            of_rows = jnp.stack([slots.is_running, slots.is_running & ~has_room])
            num_running, num_full = jnp.sum(of_rows, axis=1, dtype=jnp.int32)
            return (num_full == 0) & (num_running > stop_at) & (chunk.num_rounds < num_rounds)

        def go_round(carry: tuple[Slots, Chunk[Array]]) -> tuple[Slots, Chunk[Array]]:
            slots, chunk = carry
            if self.lookup:
                return self._look_up(params, slots, chunk, self.lookup, num_rounds)
            for wave in range(self.cached.num_waves):
                tokens = self._take_wave(slots.last_tokens, wave)[:, None]
                hidden, slots, routes = self._tick(params, slots, wave, tokens)
                hidden, routes = jax.tree.map(lambda x: x[:, 0], (hidden, routes))
                wave_out = (wave + 1) % self.cached.num_waves
                slots, chunk = self._add_tokens(params, slots, chunk, hidden, routes, wave_out)
            return replace(slots, is_full=jnp.array(True)), replace(chunk, num_rounds=chunk.num_rounds + 1)

        drawn = self.sampler.init_drawn((self.num_slots, CHUNK_LEN), self.model.config.vocab_size)
        counts = jnp.zeros(self.num_slots, jnp.int32)
        routes = self.routes and jnp.zeros((self.num_slots, CHUNK_LEN, self.routes.width), jnp.int32)
        drawn, counts, routes = jax.lax.with_sharding_constraint((drawn, counts, routes), self._rows)
        chunk = Chunk(
            drawn,
            counts,
            slots.is_running,
            jnp.array(0, jnp.int32),
            routes,
            own_rounds=counts if self.lookup else None,
        )
        slots, chunk = jax.lax.while_loop(go_on, go_round, (slots, chunk))
        return slots, replace(chunk, is_running=slots.is_running)

    def _look_up(
        self, params: Tree, slots: Slots, chunk: Chunk[Array], lookup: Lookup, limit: Array
    ) -> tuple[Slots, Chunk[Array]]:
        """Draws the next tokens of running rows, several where they are as proposed, up to `limit` a chunk."""
        tokens = lookup.take_in(slots)
        hidden, slots, routes = self._tick(params, slots, 0, tokens)
        at_each = lambda x: jnp.broadcast_to(x[:, None], tokens.shape).reshape(-1)
        index = (slots.num_generated[:, None] + jnp.arange(tokens.shape[1])).reshape(-1)
        keys, is_greedy = jax.tree.map(at_each, (slots.keys, slots.is_greedy))
        drawn = self._draw(params, hidden.reshape(-1, hidden.shape[2]), keys, index, is_greedy)
        drawn = jax.tree.map(lambda x: x.reshape(*tokens.shape, *x.shape[1:]), drawn)
        most = jnp.minimum(self.cache_length(slots) - slots.lengths, limit - chunk.counts)
        slots, chunk = lookup.keep(slots, chunk, tokens, drawn, routes, self.sampler, most)
        return slots, replace(chunk, num_rounds=chunk.num_rounds + 1)

    def _tick(self, params: Tree, slots: Slots, wave: int, tokens: Array) -> tuple[Array, Slots, Array | None]:
        """Takes in tokens of a wave; returns the hidden states of the wave after it, and tokens' experts."""
        rows = NewTokens(self._by_wave(slots.lengths), self._by_wave(slots.is_running))
        hidden, cache, flight, routes = self.cached.tick(params, slots.cache, slots.flight, wave, tokens, rows)
        return hidden, replace(slots, cache=cache, flight=flight), routes

    def _add_tokens(
        self, params: Tree, slots: Slots, chunk: Chunk[Array], hidden: Array, routes: Array | None, wave: int
    ) -> tuple[Slots, Chunk[Array]]:
        """Draws the next token of a wave's running rows, and ends those at end-of-text or max_new_tokens."""
        take = lambda x: self._take_wave(x, wave)
        index, is_running, counts = take(slots.num_generated), take(slots.is_running), take(chunk.counts)
        # In the first round the stages fill: only the wave that went in first comes out.
        is_drawn = is_running & (slots.is_full | (wave == 0))
        drawn = self._draw(params, hidden, take(slots.keys), index, jax.tree.map(take, slots.is_greedy))
        at = jnp.where(is_drawn, counts, CHUNK_LEN)

        def put(whole: Array, part: Array) -> Array:
            return self._by_wave(whole).at[:, wave].set(part).reshape(whole.shape)

        def record(whole: Array, part: Array) -> Array:
            # Mapped over rows, the scatter stays on the devices that hold them.
            one = lambda row, i, x: row.at[wave, i].set(x, mode="drop")
            return jax.vmap(one)(self._by_wave(whole), at, part).reshape(whole.shape)

        slots = replace(
            slots,
            lengths=put(slots.lengths, take(slots.lengths) + is_drawn),
            last_tokens=put(slots.last_tokens, jnp.where(is_drawn, drawn.tokens, take(slots.last_tokens))),
            num_generated=put(slots.num_generated, index + is_drawn),
            is_running=put(
                slots.is_running, is_running & ~(is_drawn & self.sampler.has_ended(drawn.tokens, index + 1))
            ),
        )
        counts = put(chunk.counts, counts + is_drawn)
        drawn, routes = jax.tree.map(record, (chunk.drawn, chunk.routes), (drawn, routes))
        return slots, replace(chunk, drawn=drawn, counts=counts, routes=routes)

    def _by_wave(self, x: Array) -> Array:
        """Returns slots `[B, ...]` as `[B/W, W, ...]`: slot b is of wave b mod W."""
        return x.reshape(-1, self.cached.num_waves, *x.shape[1:])

    def _take_wave(self, x: Array, wave: int) -> Array:
        return self._by_wave(x)[:, wave]

    def _draw(self, params: Tree, hidden: Array, keys: Array, index: Array, is_greedy: Array | None) -> Drawn[Array]:
        forward = self.cached.forward
        logits = self.model.bind_layers(params)[0].next_logits(hidden, forward.products)
        # Made with the vocabulary split; then a row's logits meet on one device, and all devices share the rows.
        logits = forward.constrain(logits, ("rows", "act_vocab"))
        run = share_rows(self.sampler.draw, self.layout, len(logits))
        # Only the draw is spread like that: fixed on both sides, it does not spread to what comes before and after.
        fix = lambda tree: jax.lax.with_sharding_constraint(tree, self._rows)
        return fix(run(logits, *fix((keys, index, is_greedy))))


def _is_stack(path: str) -> bool:
    return path.startswith("layers/")
