"""The distribution a token was drawn from, as the sampler records it and a later forward pass replays it."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.generation_config import GenerationConfig
from realjax.core.largest import largest

# The logit of a token left out of a draw. Finite, so that products with its probability, 0, stay 0.
REMOVED = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class KeptTokens:
    """How the set that one token was drawn from is stored: W int32 words a token, all zero where nothing was left out.

    The smallest form is taken. `kept`: 1 + the ids of at most top_k tokens, then zeros. `bits`: one bit for each token
    of the vocabulary. `removed`: 1 + the ids left out, where only end-of-text can be. Words read are those that an
    array has; `width` is how many the sampler writes.
    """

    vocab_size: int
    width: int
    form: Literal["kept", "bits", "removed"]

    @classmethod
    def of(cls, config: GenerationConfig, vocab_size: int, num_eos: int = 1) -> "KeptTokens | None":
        """Returns the form for `config`; None when nothing is left out, or nothing is to be recorded."""
        if config.force_no_logits_mask:
            return None
        num_words = -(-vocab_size // 32)
        if config.filters(vocab_size):
            is_short = config.top_k <= num_words
            return cls(vocab_size, min(config.top_k, num_words), "kept" if is_short else "bits")
        if config.min_new_tokens > 0 and num_eos > 0:
            return cls(vocab_size, num_eos, "removed")
        return None

    def init(self, shape: tuple[int, ...]) -> Array:
        """Returns storage for `shape` draws."""
        return jnp.zeros((*shape, self.width), jnp.int32)

    def pack(self, processed_BV: Array, drawn_B: Array, likeliest: Array | None = None) -> Array:
        """Returns the sets `[B, W]` that processed logits leave; the drawn token is always in its own.

        `likeliest` `[B, W]` are the ids of the largest logits, where they are known. Ties at the k-th largest may leave
        more than top_k tokens; `kept` holds `width` of them.
        """
        if self.form == "bits":
            return self._pack_bits(processed_BV > REMOVED)
        if self.form == "removed":
            logits, ids = largest(-processed_BV, self.width)
            return jnp.where(logits == -REMOVED, ids + 1, 0)
        ids = largest(processed_BV, self.width)[1] if likeliest is None else likeliest
        packed = jnp.where(jnp.take_along_axis(processed_BV, ids, axis=1) > REMOVED, ids + 1, 0)
        is_there = jnp.any(packed == drawn_B[:, None] + 1, axis=1)
        return packed.at[:, -1].set(jnp.where(is_there, packed[:, -1], drawn_B + 1))

    def _pack_bits(self, is_kept: Array) -> Array:
        is_kept = jnp.pad(is_kept, ((0, 0), (0, -self.vocab_size % 32)))
        bits = is_kept.reshape(is_kept.shape[0], -1, 32).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
        packed = jax.lax.bitcast_convert_type(jnp.sum(bits, axis=2, dtype=jnp.uint32), jnp.int32)
        return jnp.where(jnp.all(is_kept[:, : self.vocab_size], axis=1)[:, None], 0, packed)

    def unpack(self, packed: Array) -> Array:
        """Returns the sets `[..., W]` as masks `[..., V]`, True for a token that could be drawn."""
        if self.form == "bits":
            words = jax.lax.bitcast_convert_type(packed, jnp.uint32)
            bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
            mask = bits.reshape(*packed.shape[:-1], -1)[..., : self.vocab_size].astype(bool)
        else:
            # A scatter of W entries: comparing each of them with each of the vocabulary would cost W * V.
            is_removed = self.form == "removed"
            blank = jnp.full(self.vocab_size, is_removed)
            mark = lambda places: blank.at[places].set(not is_removed, mode="drop")
            # Mapped over rows and tokens, the scatter stays on the devices that hold them.
            for _ in packed.shape[:-1]:
                mark = jax.vmap(mark)
            mask = mark(jnp.where(packed > 0, packed - 1, self.vocab_size))
        return mask | jnp.all(packed == 0, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Draw:
    """softmax(logits / temperature) over the kept tokens; `kept` None: over all of them.

    Models of one tokenizer may have rows beyond its tokens, and not equally many: where `num_tokens` is given, all of
    them speak of the first `num_tokens` rows alone.
    """

    temperature: float = 1.0
    kept: KeptTokens | None = None
    num_tokens: int | None = None

    @classmethod
    def of(cls, config: GenerationConfig, vocab_size: int, num_eos: int = 1) -> "Draw":
        """Returns what `config` draws from, as far as it is recorded; greedy has no temperature and no filter."""
        temperature = 1.0 if config.greedy else config.temperature
        return cls(temperature, KeptTokens.of(config, vocab_size, num_eos))
