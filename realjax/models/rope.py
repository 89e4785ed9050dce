"""Rotary position embedding (arXiv:2104.09864) and the ways to stretch it over more positions than it was trained on.

How a token is turned follows from its position and the model alone, never from the length of what is computed with it:
packed rows, single ones and a cache that grows all agree.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from realjax.models.config import RopeConfig
from realjax.models.products import Products


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Array:
    """Returns the rotation frequencies `[H/2]` in radians per position, float32, of as much of a head as turns."""
    size = rope.count_dims(head_dim)
    inverse = 1.0 / rope.theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    return SCALINGS[rope.scaling](rope, inverse)


def rope_tables(rope: RopeConfig, head_dim: int, positions_RT: Array) -> tuple[Array, Array]:
    """Returns cos and sin `[R, T, H/2]`, float32, times the attention factor."""
    angles = positions_RT[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.attention_factor == 1 else (cos * rope.attention_factor, sin * rope.attention_factor)


def make_tables(
    ropes: Sequence[RopeConfig], head_dim: int, positions_RT: Array, products: Products
) -> tuple[tuple[Array, Array], ...]:
    """Returns the tables of each, for all layers."""
    tables = (rope_tables(rope, head_dim, positions_RT) for rope in ropes)
    return tuple((products.share(cos), products.share(sin)) for cos, sin in tables)


def apply_rope(x_RTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the two halves of each head, or of its first part, against each other; in float32, of x's dtype."""
    size = 2 * cos.shape[-1]
    if size < x_RTNH.shape[-1]:
        return jnp.concatenate([apply_rope(x_RTNH[..., :size], cos, sin), x_RTNH[..., size:]], axis=-1)
    first, second = jnp.split(x_RTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_RTNH.dtype)


def _keep(rope: RopeConfig, inverse: Array) -> Array:
    return inverse


def _divide(rope: RopeConfig, inverse: Array) -> Array:
    return inverse / rope.factor


def _scale_as_llama3(rope: RopeConfig, inverse: Array) -> Array:
    # Long wavelengths are stretched by `factor`, short ones kept, with a linear blend between the two bounds.
    turns = rope.original_max_positions * inverse / (2 * jnp.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return inverse * (blend + (1.0 - blend) / rope.factor)


def _scale_as_yarn(rope: RopeConfig, inverse: Array) -> Array:
    """NTK by parts (arXiv:2309.00071, section 3.2): pairs that turn `beta_fast` times within the original positions
    are kept, those that turn `beta_slow` times are stretched, with a linear blend by their number between.
    """
    size = 2 * len(inverse)

    def find_pair(num_turns: float) -> float:
        return size * math.log(rope.original_max_positions / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = find_pair(rope.beta_fast), find_pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    stretched = jnp.clip((jnp.arange(len(inverse), dtype=jnp.float32) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return inverse * (1.0 - stretched) + inverse / rope.factor * stretched


def _scale_as_longrope(rope: RopeConfig, inverse: Array) -> Array:
    """Each pair has its own divisor (arXiv:2402.13753), of one of two lists: a model of more positions than the
    original ones has the long one, for all its sequences.
    """
    return inverse / jnp.asarray(rope.long_factors if rope.factor > 1 else rope.short_factors, jnp.float32)


SCALINGS: dict[str, Callable[[RopeConfig, Array], Array]] = {
    "none": _keep,
    "linear": _divide,
    "dynamic": _keep,  # stretches what lies beyond the model's own positions, and a model is given none of these
    "llama3": _scale_as_llama3,
    "yarn": _scale_as_yarn,
    "longrope": _scale_as_longrope,
}
