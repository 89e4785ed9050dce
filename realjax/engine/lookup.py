"""Speculative decoding by lookup in a row's own text (prompt lookup, Saxena 2023; LLMA, arXiv:2304.04487).

A round proposes the tokens that followed where a row's last tokens stood before, and runs them through the model in one
pass with its last token: parameters and cache are read once for all of them. At each place a token is drawn as if those
proposed before it had been drawn. What is random follows from seed, row and place alone, so no probabilities are
compared (as in arXiv:2211.17192): the first token that differs from the proposed one is itself the one drawn there, and
what lies behind it is given up. Keys and values of such tokens are overwritten before they are seen.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.generation_config import GenerationConfig
from realjax.engine.sampling import Drawn, Sampler
from realjax.engine.slot_arrays import CHUNK_LEN, Chunk, Slots

# Mapped over rows, reads and writes stay on the devices that hold them.
_take = jax.vmap(lambda row, index: row[index])
_put = jax.vmap(lambda row, index, x: row.at[index].set(x, mode="drop"))


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """How many tokens K a round proposes, and how many of a row's last ones are looked for at most."""

    num_tokens: int
    ngram_size: int

    @classmethod
    def of(cls, config: GenerationConfig) -> "Lookup | None":
        """Returns what the options ask for; None where tokens are drawn one by one."""
        num_tokens = config.prompt_lookup_num_tokens
        return cls(num_tokens=num_tokens, ngram_size=config.max_matching_ngram_size) if num_tokens else None

    def take_in(self, slots: Slots) -> Array:
        """Returns the tokens `[B, 1 + K]` of the next round: each row's last one, and those proposed to follow it."""
        assert slots.texts is not None, "slots have texts where tokens are looked up"
        proposed = jax.vmap(self._propose)(slots.texts, slots.lengths, slots.last_tokens)
        return jnp.concatenate([slots.last_tokens[:, None], proposed], axis=1)

    def _propose(self, text: Array, length: Array, last: Array) -> Array:
        """Returns what followed the longest of a row's endings that stands before, where it stood last.

        Where that reaches the row's end it goes round: a row that repeats itself is expected to go on so, and a last
        token that never stood before to come again.
        """
        room, index = len(text), jnp.arange(len(text))
        text = jnp.where(index == length, last, text)
        is_same, num_same = index < length, jnp.zeros_like(text)
        for back in range(self.ngram_size):
            is_same &= (index >= back) & (jnp.roll(text, back) == text[length - back])
            num_same += is_same
        # The longest, and of several the last; all in one number, of which XLA's CPU backend finds the largest quickly.
        place = jnp.max(jnp.where(index < length, num_same * room + index, 0)) % room
        return text[place + 1 + jnp.arange(self.num_tokens) % jnp.maximum(length - place, 1)]

    def keep(
        self,
        slots: Slots,
        chunk: Chunk[Array],
        tokens: Array,
        drawn: Drawn[Array],
        routes: Array | None,
        sampler: Sampler,
        most: Array,
    ) -> tuple[Slots, Chunk[Array]]:
        """Adds what is drawn `[B, 1 + K]` after the `tokens` taken in, up to the first that was not proposed; ends rows
        at end-of-text or max_new_tokens. A running row gets `most` `[B]` at most, which is 1 or more.
        """
        step = jnp.arange(tokens.shape[1])
        has_ended = sampler.has_ended(drawn.tokens, slots.num_generated[:, None] + step + 1)
        goes_on = (drawn.tokens[:, :-1] == tokens[:, 1:]) & ~has_ended[:, :-1]
        num = jnp.minimum(1 + jnp.sum(jnp.cumprod(goes_on, axis=1), axis=1), most)
        num = jnp.where(slots.is_running, num, 0)
        last, at = jnp.maximum(num - 1, 0), jnp.where(step < num[:, None], chunk.counts[:, None] + step, CHUNK_LEN)
        record = lambda whole, part: _put(whole, at, part)
        chunk = replace(
            chunk,
            drawn=jax.tree.map(record, chunk.drawn, drawn),
            counts=chunk.counts + num,
            routes=jax.tree.map(record, chunk.routes, routes),
            own_rounds=jax.tree.map(lambda x: x + slots.is_running, chunk.own_rounds),
        )
        slots = replace(
            slots,
            lengths=slots.lengths + num,
            last_tokens=jnp.where(num > 0, _take(drawn.tokens, last), slots.last_tokens),
            num_generated=slots.num_generated + num,
            is_running=slots.is_running & ~_take(has_ended, last),
            texts=_put(slots.texts, slots.lengths[:, None] + step, tokens),
        )
        return slots, chunk
