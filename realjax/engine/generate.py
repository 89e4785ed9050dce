"""Generation in static shapes: slots of rows, prompts put in as slots fall free, decoding until enough of them do.

Two programs, compiled once per bucket of lengths: `admit` runs a few prompts and writes them into free slots, `advance`
decodes all slots in one device loop. The host only reads which rows have ended, and admits the next prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.core.axes import generate_rules, make_constrain
from realjax.core.draw import KeptTokens
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout
from realjax.core.trees import Tree
from realjax.engine.compiled import Compiled, CompileLog
from realjax.engine.forward import ForwardOptions, make_compute_copy
from realjax.engine.sampling import draw_tokens, process_logits, row_keys
from realjax.models.attention import make_attention
from realjax.models.build import Model, unstack_layers
from realjax.models.cache import KVCache, decode, grow_cache, init_cache, prefill, write_rows

SHORTEST_CACHE = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt `[L]` int32 to be continued. Its randomness follows from the seed, `row_id` and `sample_id` alone."""

    tokens: np.ndarray
    row_id: int
    sample_id: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """The continuation of a prompt: tokens `[N]` with the end-of-text token, if it came, and their log-probabilities.

    `kept` `[N, W]` says which tokens each was drawn from, see `core.draw.KeptTokens`; None where nothing was left out.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    ended: bool
    kept: np.ndarray | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What decoding carries from token to token, for B slots; N is max_new_tokens."""

    cache: KVCache
    lengths: Array  # [B] tokens in the cache
    num_generated: Array  # [B]
    is_running: Array  # [B]
    keys: Array  # [B] random keys
    tokens: Array  # [B, N]
    logprobs: Array  # [B, N]
    kept: Array | None  # [B, N, W]


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
        options: ForwardOptions | None = None,
        log: CompileLog | None = None,
    ) -> None:
        """Raises ValueError for a layout or a number of slots that does not divide, or a model with a scalar head."""
        if model.config.is_critic:
            raise ValueError("generate: the model has a scalar head; generation needs a language model's")
        strategy = layout.strategy
        if num_slots % strategy.dp:
            raise ValueError(f"generate: {num_slots} slots do not divide over dp={strategy.dp}; use a multiple of it")
        self.model, self.layout, self.config = model, layout, config
        self.eos_ids, self.num_slots, self.seed = tuple(eos_ids), num_slots, seed
        self.options = options or ForwardOptions()
        self.kept = KeptTokens.of(config, model.config.vocab_size, len(self.eos_ids))
        # Prompts admitted at once: enough to keep the devices busy, few enough that free slots do not wait.
        self.num_admitted = max(strategy.dp, num_slots // 4 // strategy.dp * strategy.dp)
        rules = generate_rules(strategy)
        self._constrain = make_constrain(rules, layout)
        self._attention = make_attention(self.options.attention, strategy.tp)
        compute_copy = make_compute_copy(model, rules, layout, self.options.precision)
        log = log or CompileLog()
        self._prepare = jax.jit(lambda params: unstack_layers(compute_copy(params)))
        self._admit = Compiled("generate: admit", self._admit_rows, log, donate_argnums=1)
        self._advance = Compiled("generate: advance", self._advance_rows, log, donate_argnums=1)
        self._grow = jax.jit(
            lambda slots, length: replace(slots, cache=grow_cache(slots.cache, length)), static_argnums=1
        )

    def __call__(self, params: Tree, requests: Sequence[Request]) -> list[Generation]:
        """Returns the continuation of each request, in their order."""
        self._check(requests)
        params = self._prepare(params)
        longest = max(len(request.tokens) for request in requests)
        slots = self._empty_slots(cache_length(longest + 1))
        waiting = list(range(len(requests)))[::-1]
        owner: dict[int, int] = {}  # slot -> request
        results: dict[int, Generation] = {}
        while waiting or owner:
            free = [slot for slot in range(self.num_slots) if slot not in owner]
            while waiting and free:
                taken = [waiting.pop() for _ in range(min(len(free), len(waiting), self.num_admitted))]
                places, free = free[: len(taken)], free[len(taken) :]
                owner |= dict(zip(places, taken))
                slots = self._admit(params, slots, *self._pack_prompts([requests[i] for i in taken], places))
            # Go on until enough slots are free for the next prompts, or all are.
            stop_at = max(0, len(owner) - self.num_admitted) if waiting else 0
            slots = self._advance(params, slots, jax.device_put(np.int32(stop_at), self.layout.replicated))
            is_running, lengths = np.asarray(slots.is_running), np.asarray(slots.lengths)
            ended = [slot for slot in owner if not is_running[slot]]
            results |= dict(zip([owner.pop(slot) for slot in ended], self._collect(slots, ended)))
            if any(lengths[slot] >= slots.cache.length for slot in owner):
                slots = self._grow(slots, cache_length(slots.cache.length + 1))
        return [results[i] for i in range(len(requests))]

    def _check(self, requests: Sequence[Request]) -> None:
        most, new = self.model.config.max_positions, self.config.max_new_tokens
        for request in requests:
            if not 0 < len(request.tokens) <= most - new:
                raise ValueError(
                    f"generate: prompt {request.row_id} has {len(request.tokens)} tokens; with max_new_tokens={new} "
                    f"and the "
                    f"model's {most} positions it needs 1 to {most - new}; shorten prompts or lower max_new_tokens"
                )

    def _empty_slots(self, length: int) -> Slots:
        B, N = self.num_slots, self.config.max_new_tokens
        rows = self.layout.sharding("data")

        def make() -> Slots:
            return Slots(
                cache=init_cache(self.model.config, B, length, self.options.precision.dtype),
                lengths=jnp.zeros(B, jnp.int32),
                num_generated=jnp.zeros(B, jnp.int32),
                is_running=jnp.zeros(B, bool),
                keys=row_keys(self.seed, jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32)),
                tokens=jnp.zeros((B, N), jnp.int32),
                logprobs=jnp.zeros((B, N), jnp.float32),
                kept=self.kept.init((B, N)) if self.kept else None,
            )

        return jax.jit(make, out_shardings=rows)()

    def _pack_prompts(self, requests: Sequence[Request], places: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Returns tokens `[A, T]`, lengths, slots, row and sample numbers `[A]`; unused rows have no slot."""
        A, T = self.num_admitted, cache_length(max(len(r.tokens) for r in requests), shortest=32)
        tokens, lengths = np.zeros((A, T), np.int32), np.ones(A, np.int32)
        slots, rows, samples = np.full(A, self.num_slots, np.int32), np.zeros(A, np.int32), np.zeros(A, np.int32)
        for i, (request, place) in enumerate(zip(requests, places)):
            tokens[i, : len(request.tokens)], lengths[i] = request.tokens, len(request.tokens)
            slots[i], rows[i], samples[i] = place, request.row_id, request.sample_id
        return tuple(jax.device_put(x, self.layout.replicated) for x in (tokens, lengths, slots, rows, samples))

    def _admit_rows(
        self, params: Tree, slots: Slots, tokens: Array, lengths: Array, places: Array, rows: Array, samples: Array
    ) -> Slots:
        transformer, blocks = self.model.bind_layers(params)
        hidden, prompts = prefill(transformer, blocks, tokens, lengths, self._attention, self._constrain)
        put = lambda whole, part: whole.at[places].set(part, mode="drop")
        zeros = jnp.zeros_like(lengths)
        slots = replace(
            slots,
            cache=write_rows(slots.cache, prompts, places),
            lengths=put(slots.lengths, lengths),
            num_generated=put(slots.num_generated, zeros),
            is_running=put(slots.is_running, zeros == 0),
            keys=put(slots.keys, row_keys(self.seed, rows, samples)),
        )
        is_new = put(jnp.zeros_like(slots.is_running), zeros == 0)
        logits = put(
            jnp.zeros((self.num_slots, self.model.config.vocab_size), jnp.float32), self._logits(transformer, hidden)
        )
        return self._draw(slots, logits, is_new)

    def _advance_rows(self, params: Tree, slots: Slots, stop_at: Array) -> Slots:
        transformer, blocks = self.model.bind_layers(params)

        def go_on(slots: Slots) -> Array:
            has_room = jnp.all(~slots.is_running | (slots.lengths < slots.cache.length))
            return has_room & (jnp.sum(slots.is_running) > stop_at)

        def step(slots: Slots) -> Slots:
            last = jnp.take_along_axis(slots.tokens, jnp.maximum(slots.num_generated - 1, 0)[:, None], axis=1)[:, 0]
            hidden, cache = decode(transformer, blocks, slots.cache, last, slots.lengths, self._constrain)
            slots = replace(slots, cache=cache, lengths=slots.lengths + slots.is_running)
            return self._draw(slots, self._logits(transformer, hidden), slots.is_running)

        return jax.lax.while_loop(go_on, step, slots)

    def _logits(self, transformer: Any, hidden: Array) -> Array:
        return jnp.einsum("BD,DV->BV", hidden, transformer.head_kernel(), preferred_element_type=jnp.float32)

    def _draw(self, slots: Slots, logits: Array, is_drawn: Array) -> Slots:
        """Draws the next token of the rows `is_drawn`, and ends those at an end-of-text token or at max_new_tokens."""
        index = slots.num_generated
        processed = process_logits(logits, index, self.eos_ids, self.config)
        tokens, logprobs = draw_tokens(processed, slots.keys, index, greedy=self.config.greedy)
        rows = jnp.arange(self.num_slots)
        at = jnp.where(is_drawn, index, self.config.max_new_tokens)
        record = lambda whole, part: whole.at[rows, at].set(part, mode="drop")
        is_eos = jnp.isin(tokens, jnp.array(self.eos_ids, jnp.int32))
        num_generated = index + is_drawn
        has_ended = is_drawn & (is_eos | (num_generated >= self.config.max_new_tokens))
        return replace(
            slots,
            num_generated=num_generated,
            is_running=slots.is_running & ~has_ended,
            tokens=record(slots.tokens, tokens),
            logprobs=record(slots.logprobs, logprobs),
            kept=record(slots.kept, self.kept.pack(processed, tokens)) if self.kept else None,
        )

    def _collect(self, slots: Slots, ended: Sequence[int]) -> list[Generation]:
        if not ended:
            return []
        tokens, logprobs, counts = map(np.asarray, (slots.tokens, slots.logprobs, slots.num_generated))
        kept = None if slots.kept is None else np.asarray(slots.kept)
        return [
            Generation(
                tokens=tokens[slot, : counts[slot]].copy(),
                logprobs=logprobs[slot, : counts[slot]].copy(),
                ended=int(tokens[slot, counts[slot] - 1]) in self.eos_ids,
                kept=None if kept is None else kept[slot, : counts[slot]].copy(),
            )
            for slot in ended
        ]


def cache_length(num_tokens: int, shortest: int = SHORTEST_CACHE) -> int:
    """Returns the bucket of a length: `shortest` times a power of two."""
    length = shortest
    while length < num_tokens:
        length *= 2
    return length
