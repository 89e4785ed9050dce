"""One draw per row: end-of-text suppression, temperature, top-k and top-p, a token and its log-probability.

As in ReaL, both filters see the same logits, divided by the temperature and without suppressed tokens; what either
removes is removed. The log-probability is that of the distribution drawn from. Greedy takes no temperature and
no filter.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.core.draw import REMOVED, KeptTokens
from realjax.core.generation_config import GenerationConfig
from realjax.core.largest import largest

DRAW_BLOCK = 256
# What top-p leaves is looked for among so many tokens first. Trained models rarely leave more, and then few positions.
MOST_LIKELY = 128

A = TypeVar("A", Array, np.ndarray)  # on the devices, or on the host


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn(Generic[A]):
    """Tokens `[...]` drawn, int32, with their log-probabilities `[...]`, float32.

    `kept` `[..., W]` are the sets they were drawn from, see `core.draw.KeptTokens`; None where sets are not recorded.
    """

    tokens: A
    logprobs: A
    kept: A | None


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How tokens are drawn. What is random follows from the seed, a row's numbers and how many tokens it has generated,
    never from its neighbours.
    """

    config: GenerationConfig
    eos_ids: tuple[int, ...]
    seed: int
    num_tokens: int | None = None  # only the first so many of the vocabulary are drawn; None: any

    def draw(self, logits_BV: Array, keys: Array, num_generated: Array, is_greedy: Array | None) -> Drawn[Array]:
        """Returns the next token of each row; `is_greedy` `[B]` marks those that take the likeliest, None: as `config`
        says.
        """
        logits_BV = logits_BV[:, : self.num_tokens]
        scaled = scale_logits(logits_BV, num_generated, self.eos_ids, self.config, is_greedy)
        processed, ids = filter_logits(scaled, self.config, is_greedy)
        tokens, logprobs = draw_tokens(processed, keys, num_generated, is_greedy=self.config.greedy or is_greedy)
        if (stored := self.find_kept_form(logits_BV.shape[1])) is None:
            return Drawn(tokens, logprobs, None)
        kept = stored.pack(processed, tokens, ids)
        return Drawn(tokens, logprobs, kept if is_greedy is None else jnp.where(is_greedy[:, None], 0, kept))

    def find_kept_form(self, vocab_size: int) -> KeptTokens | None:
        """Returns how the sets are stored that tokens are drawn from; None where sets are not recorded."""
        return KeptTokens.of(self.config, self.num_tokens or vocab_size, len(self.eos_ids))

    def init_drawn(self, shape: tuple[int, ...], vocab_size: int) -> Drawn[Array]:
        """Returns storage for `shape` draws."""
        stored = self.find_kept_form(vocab_size)
        kept = None if stored is None else stored.init(shape)
        return Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), kept)

    def make_keys(self, row_ids: Array, sample_ids: Array) -> Array:
        """Returns the random keys of rows, see `row_keys`."""
        return row_keys(self.seed, row_ids, sample_ids)

    def has_ended(self, tokens: Array, num_generated: Array) -> Array:
        """Returns whether rows end with these tokens, the last of `num_generated`."""
        is_eos = jnp.isin(tokens, jnp.array(self.eos_ids, jnp.int32))
        return is_eos | (num_generated >= self.config.max_new_tokens)


def scale_logits(
    logits_BV: Array,
    num_generated: Array,
    eos_ids: tuple[int, ...],
    config: GenerationConfig,
    is_greedy: Array | None = None,
) -> Array:
    """Returns the float32 logits `[B, V]` that are filtered: where end-of-text would be early, the least float is its.

    `num_generated` `[B]` is how many tokens each row has generated so far.
    """
    logits = logits_BV.astype(jnp.float32)
    if not config.greedy:
        logits /= config.temperature if is_greedy is None else jnp.where(is_greedy, 1, config.temperature)[:, None]
    if config.min_new_tokens > 0 and eos_ids:
        too_early = (num_generated < config.min_new_tokens)[:, None]
        is_eos = jnp.isin(jnp.arange(logits.shape[1]), jnp.array(eos_ids))[None]
        logits = jnp.where(too_early & is_eos, REMOVED, logits)
    return logits


def filter_logits(
    logits_BV: Array, config: GenerationConfig, is_greedy: Array | None = None
) -> tuple[Array, Array | None]:
    """Returns the logits of the distribution to draw from, those of removed tokens the least float, and the ids
    `[B, top_k]` of the likeliest tokens, in order: with top-k the only ones that are left, but for ties with the last.
    """
    if not config.filters(logits_BV.shape[1]):
        return logits_BV, None
    least, ids = least_kept(logits_BV, config.top_k, config.top_p)
    is_removed = logits_BV < least[:, None]
    is_removed = is_removed if is_greedy is None else is_removed & ~is_greedy[:, None]
    return jnp.where(is_removed, REMOVED, logits_BV), ids


def least_kept(logits_BV: Array, top_k: int, top_p: float) -> tuple[Array, Array | None]:
    """Returns the least logit of each row `[B]` that both filters keep, and the ids `[B, top_k]` of the likeliest; ties
    with it stay, and the largest always does.

    top-k keeps what is no less than the k-th largest; top-p keeps a token when the likelier ones hold less than top_p.
    """
    vocab_size = logits_BV.shape[1]
    if top_k < vocab_size:
        likeliest, ids = largest(logits_BV, top_k)
        return (likeliest[:, -1] if top_p >= 1 else _find_least(likeliest, logits_BV, top_p)[0]), ids
    if vocab_size <= MOST_LIKELY:
        return bisect_top_p(logits_BV, top_p), None
    least, is_found = _find_least(largest(logits_BV, MOST_LIKELY)[0], logits_BV, top_p)
    return jax.lax.cond(jnp.all(is_found), lambda: least, lambda: bisect_top_p(logits_BV, top_p)), None


def _find_least(likeliest: Array, logits_BV: Array, top_p: float) -> tuple[Array, Array]:
    """Returns the least logit of the likeliest `[B, K]`, in order, that top-p keeps, and whether it keeps no others."""
    probs = jnp.exp(likeliest - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True))
    running = jnp.cumsum(probs, axis=1)
    least = jnp.min(jnp.where(running - probs < top_p, likeliest, jnp.inf), axis=1)
    return least, running[:, -1] >= top_p


def bisect_top_p(logits_BV: Array, top_p: float) -> Array:
    """Returns the least logit of each row `[B]` that top-p keeps; ties with it stay, and the largest always does.

    Found by bisection on the ordered bits of the floats, which is exact and needs no order of the vocabulary, in 32
    passes over it: for rows whose distribution is flat.
    """
    probs = jax.nn.softmax(logits_BV, axis=-1)
    keys = _ordered_bits(logits_BV)

    def mass_above(key: Array) -> Array:
        return jnp.sum(jnp.where(keys > key[:, None], probs, 0), axis=1)

    def halve(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bounds  # mass above low >= top_p > mass above high
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        is_kept = mass_above(middle) < top_p
        return (jnp.where(is_kept, low, middle), jnp.where(is_kept, middle, high)), None

    most = jnp.max(keys, axis=1)
    start = (jnp.full_like(most, jnp.iinfo(jnp.int32).min), most)
    (_, least), _ = jax.lax.scan(halve, start, None, length=32)
    # The bisection ends between two logits: the bound is the least logit at or above it.
    return jnp.min(jnp.where(keys >= least[:, None], logits_BV, jnp.inf), axis=1)


def _ordered_bits(x: Array) -> Array:
    """Returns int32 keys that order as the floats do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def row_keys(seed: int, row_ids: Array, sample_ids: Array) -> Array:
    """Returns one random key per row `[B]`, from the seed, its prompt's number and its sample's alone."""
    base = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda row, sample: jax.random.fold_in(jax.random.fold_in(base, row), sample))(row_ids, sample_ids)


def draw_tokens(
    processed_BV: Array, keys: Array, num_generated: Array, *, is_greedy: Array | bool | None
) -> tuple[Array, Array]:
    """Returns tokens int32 `[B]` and their log-probabilities float32 `[B]`; `is_greedy` may differ from row to row."""
    log_probs = jax.nn.log_softmax(processed_BV, axis=-1)
    if is_greedy is True:
        tokens = _likeliest(processed_BV)
    else:
        uniforms = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(keys, num_generated)
        tokens = _invert_cdf(jnp.exp(log_probs), uniforms)
        if isinstance(is_greedy, jax.Array):
            tokens = jnp.where(is_greedy, _likeliest(processed_BV), tokens)
    tokens = tokens.astype(jnp.int32)
    return tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]


def _likeliest(logits_BV: Array) -> Array:
    """Returns the first index of the largest logit."""
    # A maximum and a minimum over the vocabulary; XLA's CPU backend takes several times as long for an argmax.
    is_largest = logits_BV == jnp.max(logits_BV, axis=1, keepdims=True)
    return jnp.min(jnp.where(is_largest, jnp.arange(logits_BV.shape[1]), logits_BV.shape[1] - 1), axis=1)


def _invert_cdf(probs_BV: Array, uniforms: Array) -> Array:
    """Returns the first token whose cumulative probability exceeds the row's uniform number.

    Two levels, blocks and then tokens of one block, keep float32 sums short; a token of probability 0 is never
    returned.
    """
    B, V = probs_BV.shape
    blocks = jnp.pad(probs_BV, ((0, 0), (0, -V % DRAW_BLOCK))).reshape(B, -1, DRAW_BLOCK)
    block, rest = _first_above(jnp.sum(blocks, axis=2), uniforms, scale=True)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token, _ = _first_above(within, rest, scale=False)
    return block * DRAW_BLOCK + token


def _first_above(weights: Array, target: Array, *, scale: bool) -> tuple[Array, Array]:
    """Returns the first index whose running sum exceeds the target and has weight, and what is left of the target
    there.
    """
    running = jnp.cumsum(weights, axis=1)
    target = target * running[:, -1] if scale else target
    index = jnp.argmax((running > target[:, None]) & (weights > 0), axis=1)
    # Rounding may leave the target at or beyond the total: take the last index with weight.
    last = weights.shape[1] - 1 - jnp.argmax((weights > 0)[:, ::-1], axis=1)
    index = jnp.where(target < running[:, -1], index, last)
    before = jnp.take_along_axis(running - weights, index[:, None], axis=1)[:, 0]
    return index, target - before
