"""Generation in static shapes: slots of rows, prompts put in as slots fall free, decoding until enough of them do.

Two programs, compiled once per bucket of lengths: `admit` runs a few prompts and writes them into free slots, `advance`
decodes all slots in one device loop. The host only reads which rows have ended, and admits the next prompts. The
cached model says how the layers are spread over devices. A sequence-parallel flag has no effect: one token a row is no
sequence to split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from realjax.core.draw import KeptTokens
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout
from realjax.core.trees import Tree
from realjax.engine.cached_model import CachedModel, OneStage
from realjax.engine.cached_pipeline import Stages
from realjax.engine.compiled import Compiled, CompileLog
from realjax.engine.forward import ForwardOptions
from realjax.engine.sampling import Drawn, draw, row_keys
from realjax.models.build import Model

SHORTEST_CACHE, SHORTEST_PROMPTS = 128, 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt `[L]` int32 to be continued. Its randomness follows from the seed, `row_id` and `sample_id` alone.

    `is_greedy` takes the likeliest tokens, whatever the options say of sampling.
    """

    tokens: np.ndarray
    row_id: int
    sample_id: int = 0
    is_greedy: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """The continuation of a prompt: tokens `[N]` with the end-of-text token, if it came, and their log-probabilities.

    `kept` `[N, W]` says which tokens each was drawn from, see `core.draw.KeptTokens`; None where sets are not recorded.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    ended: bool
    kept: np.ndarray | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What decoding carries from token to token, for B slots; N is max_new_tokens."""

    cache: Any
    lengths: Array  # [B] tokens in the cache
    num_generated: Array  # [B]
    is_running: Array  # [B]
    keys: Array  # [B] random keys
    is_greedy: Array | None  # [B]; None: no row differs from the options
    drawn: Drawn  # [B, N]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """A prompts to be put into slots; unused rows have the number of slots for a place."""

    tokens: Array  # [A, T]
    lengths: Array  # [A]
    places: Array  # [A]
    row_ids: Array  # [A]
    sample_ids: Array  # [A]
    is_greedy: Array  # [A]


class Generator:
    """Continues prompts on one layout, with continuous batching over a fixed number of slots."""

    def __init__(
        self,
        model: Model,
        layout: Layout,
        config: GenerationConfig,
        *,
        eos_ids: Sequence[int],
        num_slots: int,
        seed: int,
        num_tokens: int | None = None,
        options: ForwardOptions | None = None,
        log: CompileLog | None = None,
        fetch_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        """Only the first `num_tokens` tokens are drawn; None: any. `fetch_fn(tree)` turns arrays that are whole on each
        device of the layout into numpy ones, in every process.

        Raises ValueError for a layout or a number of slots that does not divide, or a model with a scalar head.
        """
        if model.config.is_critic:
            raise ValueError("generate: the model has a scalar head; generation needs a language model's")
        options = options or ForwardOptions()
        self.cached: CachedModel = (OneStage if layout.strategy.pp == 1 else Stages)(model, layout, options)
        multiple = layout.strategy.row_multiple
        if num_slots % multiple:
            raise ValueError(
                f"generate: {num_slots} slots do not divide over dp={layout.strategy.dp} and pp={layout.strategy.pp}; "
                f"use a multiple of {multiple}"
            )
        self.model, self.layout, self.config = model, layout, config
        self.eos_ids, self.num_slots, self.seed = tuple(eos_ids), num_slots, seed
        self.num_tokens = num_tokens or model.config.vocab_size
        self.kept = KeptTokens.of(config, self.num_tokens, len(self.eos_ids))
        self.fetch_fn = fetch_fn or (lambda tree: jax.tree.map(np.asarray, tree))
        # Prompts admitted at once: enough to keep the devices busy, few enough that free slots do not wait.
        self.num_admitted = max(multiple, num_slots // 4 // multiple * multiple)
        self._make_programs(log or CompileLog())

    def _make_programs(self, log: CompileLog) -> None:
        rows, whole = self.layout.sharding("data"), self.layout.replicated
        of_fields: dict[str, Any] = {field.name: rows for field in fields(Slots)}
        slots = Slots(**{**of_fields, "cache": self.cached.cache_sharding})
        named = lambda name, fn, out, **options: Compiled(f"generate: {name}", fn, log, out_shardings=out, **options)
        self._prepare = jax.jit(self.cached.prepare)
        self._start = jax.jit(self._empty_slots, static_argnums=(0, 1), out_shardings=slots)
        self._admit = named("admit", self._admit_prompts, slots, donate_argnums=1)
        self._advance = named("advance", self._advance_slots, (slots, whole), donate_argnums=1)
        self._take = named("take", self._take_rows, whole)
        self._grow = jax.jit(self._grow_cache, static_argnums=1, out_shardings=slots)

    def __call__(
        self, params: Tree, requests: Sequence[Request], progress_fn: Callable[[int], None] | None = None
    ) -> list[Generation]:
        """Returns the continuation of each request, in their order; `progress_fn` is told how many have ended."""
        self._check(requests)
        params = self._prepare(params)
        longest = max(len(request.tokens) for request in requests)
        slots = self._start(cache_length(longest + 1), any(request.is_greedy for request in requests))
        waiting = list(range(len(requests)))[::-1]
        owner: dict[int, int] = {}  # slot -> request
        results: dict[int, Generation] = {}
        while waiting or owner:
            free = [slot for slot in range(self.num_slots) if slot not in owner]
            while waiting and free:
                taken = [waiting.pop() for _ in range(min(len(free), len(waiting), self.num_admitted))]
                places, free = free[: len(taken)], free[len(taken) :]
                owner |= dict(zip(places, taken))
                slots = self._admit(params, slots, self._pack_prompts([requests[i] for i in taken], places))
            # Go on until enough slots are free for the next prompts, or all are.
            stop_at = max(0, len(owner) - self.num_admitted) if waiting else 0
            slots, state = self._advance(params, slots, self._put(np.array(stop_at, np.int32)))
            state = self.fetch_fn(state)
            ended = [slot for slot in owner if not state["is_running"][slot]]
            results |= dict(zip([owner.pop(slot) for slot in ended], self._collect(slots, ended)))
            if progress_fn is not None:
                progress_fn(len(results))
            if any(state["lengths"][slot] >= self.cached.cache_length(slots.cache) for slot in owner):
                slots = self._grow(slots, cache_length(self.cached.cache_length(slots.cache) + 1))
        return [results[i] for i in range(len(requests))]

    @property
    def device_bytes(self) -> int:
        """What the larger of the two programs took of a device when it ran last."""
        return max(self._admit.device_bytes, self._advance.device_bytes)

    def _check(self, requests: Sequence[Request]) -> None:
        most, new = self.model.config.max_positions, self.config.max_new_tokens
        for request in requests:
            if not 0 < len(request.tokens) <= most - new:
                raise ValueError(
                    f"generate: prompt {request.row_id} has {len(request.tokens)} tokens; with max_new_tokens={new} "
                    f"and the "
                    f"model's {most} positions it needs 1 to {most - new}; shorten prompts or lower max_new_tokens"
                )

    def _empty_slots(self, length: int, has_greedy: bool) -> Slots:
        B, N = self.num_slots, self.config.max_new_tokens
        return Slots(
            cache=self.cached.init_cache(B, length),
            lengths=jnp.zeros(B, jnp.int32),
            num_generated=jnp.zeros(B, jnp.int32),
            is_running=jnp.zeros(B, bool),
            keys=row_keys(self.seed, jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32)),
            is_greedy=jnp.zeros(B, bool) if has_greedy and not self.config.greedy else None,
            drawn=Drawn(
                tokens=jnp.zeros((B, N), jnp.int32),
                logprobs=jnp.zeros((B, N), jnp.float32),
                kept=self.kept.init((B, N)) if self.kept else None,
            ),
        )

    def _grow_cache(self, slots: Slots, length: int) -> Slots:
        return replace(slots, cache=self.cached.grow(slots.cache, length))

    def _pack_prompts(self, requests: Sequence[Request], places: Sequence[int]) -> Prompts:
        A, T = self.num_admitted, cache_length(max(len(r.tokens) for r in requests), shortest=SHORTEST_PROMPTS)
        tokens, lengths = np.zeros((A, T), np.int32), np.ones(A, np.int32)
        for i, request in enumerate(requests):
            tokens[i, : len(request.tokens)], lengths[i] = request.tokens, len(request.tokens)
        slots = np.concatenate([places, np.full(A - len(places), self.num_slots)]).astype(np.int32)
        numbers = np.zeros((3, A), np.int32)
        numbers[:, : len(requests)] = np.array([(r.row_id, r.sample_id, r.is_greedy) for r in requests]).T
        row_ids, sample_ids, is_greedy = numbers
        return Prompts(*map(self._put, (tokens, lengths, slots, row_ids, sample_ids, is_greedy.astype(bool))))

    def _put(self, array: np.ndarray) -> Array:
        # Every process has the whole array; device_put would stop all of them to compare it.
        return jax.make_array_from_callback(
            array.shape, self.layout.replicated, lambda index: array[index], dtype=array.dtype
        )

    def _admit_prompts(self, params: Tree, slots: Slots, prompts: Prompts) -> Slots:
        hidden, cache = self.cached.admit(params, slots.cache, prompts.tokens, prompts.lengths, prompts.places)
        keys = row_keys(self.seed, prompts.row_ids, prompts.sample_ids)
        is_greedy = None if slots.is_greedy is None else prompts.is_greedy
        zeros = jnp.zeros_like(prompts.lengths)
        drawn = self._draw(params, hidden, keys, zeros, is_greedy)

        def put(whole: Any, part: Any, *index: int) -> Any:
            return jax.tree.map(lambda x, new: x.at[prompts.places, *index].set(new, mode="drop"), whole, part)

        return Slots(
            cache=cache,
            lengths=put(slots.lengths, prompts.lengths),
            num_generated=put(slots.num_generated, zeros + 1),
            is_running=put(slots.is_running, ~self._has_ended(drawn.tokens, zeros + 1)),
            keys=put(slots.keys, keys),
            is_greedy=put(slots.is_greedy, is_greedy),
            drawn=put(slots.drawn, drawn, 0),
        )

    def _advance_slots(self, params: Tree, slots: Slots, stop_at: Array) -> tuple[Slots, dict[str, Array]]:
        num_groups = self.cached.num_groups

        def go_on(carry: tuple[Slots, Any, Array]) -> Array:
            slots = carry[0]
            has_room = jnp.all(~slots.is_running | (slots.lengths < self.cached.cache_length(slots.cache)))
            return has_room & (jnp.sum(slots.is_running) > stop_at)

        def go_round(carry: tuple[Slots, Any, Array]) -> tuple[Slots, Any, Array]:
            slots, flight, is_full = carry
            for group in range(num_groups):
                hidden, cache, flight = self._tick(params, slots, flight, group)
                slots = replace(slots, cache=cache)
                # In the first round the stages fill: only the group that went in first comes out.
                is_out = is_full | (group == num_groups - 1)
                slots = self._add_tokens(params, slots, hidden, (group + 1) % num_groups, is_out)
            return slots, flight, jnp.array(True)

        carry = (slots, self.cached.init_flight(self.num_slots), jnp.array(False))
        slots = jax.lax.while_loop(go_on, go_round, carry)[0]
        return slots, {"is_running": slots.is_running, "lengths": slots.lengths}

    def _tick(self, params: Tree, slots: Slots, flight: Any, group: int) -> tuple[Array, Any, Any]:
        last = jnp.maximum(self._of_group(slots.num_generated, group) - 1, 0)
        tokens = jnp.take_along_axis(self._of_group(slots.drawn.tokens, group), last[:, None], axis=1)[:, 0]
        return self.cached.tick(params, slots.cache, flight, group, tokens, self._by_group(slots.lengths))

    def _add_tokens(self, params: Tree, slots: Slots, hidden: Array, group: int, is_out: Array) -> Slots:
        """Draws the next token of a group's running rows, and ends those at end-of-text or max_new_tokens."""
        of_group = lambda x: self._of_group(x, group)
        index, is_running = of_group(slots.num_generated), of_group(slots.is_running)
        is_drawn = is_running & is_out
        drawn = self._draw(params, hidden, of_group(slots.keys), index, jax.tree.map(of_group, slots.is_greedy))
        at = jnp.where(is_drawn, index, self.config.max_new_tokens)

        def put(whole: Array, part: Array) -> Array:
            return self._by_group(whole).at[:, group].set(part).reshape(whole.shape)

        def record(whole: Array, part: Array) -> Array:
            # Mapped over rows, the scatter stays on the devices that hold them.
            one = lambda row, i, x: row.at[group, i].set(x, mode="drop")
            return jax.vmap(one)(self._by_group(whole), at, part).reshape(whole.shape)

        return replace(
            slots,
            lengths=put(slots.lengths, of_group(slots.lengths) + is_drawn),
            num_generated=put(slots.num_generated, index + is_drawn),
            is_running=put(slots.is_running, is_running & ~(is_drawn & self._has_ended(drawn.tokens, index + 1))),
            drawn=jax.tree.map(record, slots.drawn, drawn),
        )

    def _by_group(self, x: Array) -> Array:
        """Returns slots `[B, ...]` as `[B/G, G, ...]`: slot b is of group b mod G."""
        return x.reshape(-1, self.cached.num_groups, *x.shape[1:])

    def _of_group(self, x: Array, group: int) -> Array:
        return self._by_group(x)[:, group]

    def _draw(self, params: Tree, hidden: Array, keys: Array, index: Array, is_greedy: Array | None) -> Drawn:
        logits = self.model.bind_layers(params)[0].next_logits(hidden)
        # Made with the vocabulary split; then a row's logits meet on one device, and all devices share the rows.
        logits = self.cached.constrain(logits, ("rows", "act_vocab"))
        all_axes = ("data", "tensor", "pipe")
        spec = PartitionSpec(all_axes if len(logits) % self.layout.strategy.size == 0 else "data")
        fn = partial(draw, eos_ids=self.eos_ids, config=self.config, stored=self.kept, num_tokens=self.num_tokens)
        run = jax.shard_map(fn, mesh=self.layout.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        # Only the draw is spread like that: fixed on both sides, it does not spread to what comes before and after.
        fix = lambda tree: jax.lax.with_sharding_constraint(tree, self.layout.sharding("data"))
        return fix(run(logits, *fix((keys, index, is_greedy))))

    def _has_ended(self, tokens: Array, num_generated: Array) -> Array:
        is_eos = jnp.isin(tokens, jnp.array(self.eos_ids, jnp.int32))
        return is_eos | (num_generated >= self.config.max_new_tokens)

    def _take_rows(self, slots_drawn: Drawn, num_generated: Array, rows: Array) -> tuple[Drawn, Array]:
        return jax.tree.map(lambda x: x[rows], (slots_drawn, num_generated))

    def _collect(self, slots: Slots, ended: Sequence[int]) -> list[Generation]:
        generations: list[Generation] = []
        for first in range(0, len(ended), self.num_admitted):
            part = ended[first : first + self.num_admitted]
            rows = self._put(np.resize(np.array(part, np.int32), self.num_admitted))
            drawn, counts = self.fetch_fn(self._take(slots.drawn, slots.num_generated, rows))
            for i, count in enumerate(counts[: len(part)]):
                tokens, logprobs = drawn.tokens[i, :count].copy(), drawn.logprobs[i, :count].copy()
                kept = None if drawn.kept is None else drawn.kept[i, :count].copy()
                ended_so = int(tokens[-1]) in self.eos_ids
                generations.append(Generation(tokens=tokens, logprobs=logprobs, ended=ended_so, kept=kept))
        return generations


def cache_length(num_tokens: int, shortest: int = SHORTEST_CACHE) -> int:
    """Returns the bucket of a length: `shortest` times a power of two."""
    length = shortest
    while length < num_tokens:
        length *= 2
    return length
