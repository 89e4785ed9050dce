"""Linear maps, norms and rotary embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from realjax.models import sums
from realjax.models.config import NormConfig, RopeConfig
from realjax.models.products import Products


def make_param(shape: tuple[int, ...], names: tuple[str, ...]) -> nnx.Param:
    """Returns a parameter slot with its axis names; `build.init_params` or a checkpoint gives it values."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), out_sharding=names, eager_sharding=False)


class Linear(nnx.Module):
    """x @ kernel (+ bias) over the last `num_in` dims of x; kernels keep heads as a dim of their own."""

    def __init__(self, in_dims: dict[str, int], out_dims: dict[str, int], bias: bool = False) -> None:
        self.kernel = make_param((*in_dims.values(), *out_dims.values()), (*in_dims, *out_dims))
        # A bias over the model dim is a vector like a norm's scale: never split.
        names = tuple("norm" if name == "embed" else name for name in out_dims)
        self.bias = make_param(tuple(out_dims.values()), names) if bias else None
        self.num_in = len(in_dims)

    def __call__(self, x: Array, products: Products, time: str = "time") -> Array:
        """Returns the map of x `[R, T, *I]`, whose second dim is named `time`: `[R, T, *O]`."""
        kernel = self.kernel[...]
        y = products.over_tokens(lambda x: products.matmul(x, kernel, self.num_in), x, time)
        return y if self.bias is None else sums.add_bias(y, self.bias[...])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, statistics in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, config: NormConfig, name: str = "norm") -> None:
        if config.one_plus:
            self.scale_less_one = make_param((size,), (name,))
        else:
            self.scale = make_param((size,), (name,))
        self.eps, self.one_plus = config.eps, config.one_plus

    def __call__(self, x: Array, products: Products, time: str = "time") -> Array:
        """Returns the normed x `[R, T, ..., D]`, whose second dim is named `time`."""
        return products.over_tokens(self._normalise, x, time)

    def _normalise(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.one_plus:
            # In float32 to the end: in 16 bits, 1 + w would lose most of w.
            return sums.scale_by(x32 * inverse_rms, 1 + self.scale_less_one[...].astype(jnp.float32)).astype(x.dtype)
        return sums.scale_by((x32 * inverse_rms).astype(x.dtype), self.scale[...])


class LayerNorm(nnx.Module):
    """(x - mean(x)) / deviation(x) * scale + bias, all in float32 (arXiv:1607.06450)."""

    def __init__(self, size: int, config: NormConfig, name: str = "norm") -> None:
        self.scale, self.bias = make_param((size,), (name,)), make_param((size,), (name,))
        self.eps = config.eps

    def __call__(self, x: Array, products: Products, time: str = "time") -> Array:
        """Returns the normed x `[R, T, ..., D]`, whose second dim is named `time`."""
        return products.over_tokens(self._normalise, x, time)

    def _normalise(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse_deviation = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scaled = sums.scale_by(centred * inverse_deviation, self.scale[...].astype(jnp.float32))
        return sums.add_bias(scaled, self.bias[...].astype(jnp.float32)).astype(x.dtype)


Norm = RMSNorm | LayerNorm
NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(size: int, config: NormConfig, name: str = "norm") -> Norm:
    """Returns the norm that `config` describes over a last dim of this size and axis name."""
    return NORMS[config.kind](size, config, name)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Array:
    """Returns the rotation frequencies `[H/2]` in radians per position, float32."""
    inverse = 1.0 / rope.theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.scaling == "linear":
        return inverse / rope.factor
    if rope.scaling == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, with a linear blend between the two bounds.
        turns = rope.original_max_positions * inverse / (2 * jnp.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        return inverse * (blend + (1.0 - blend) / rope.factor)
    return inverse


def rope_tables(rope: RopeConfig, head_dim: int, positions_RT: Array) -> tuple[Array, Array]:
    """Returns cos and sin `[R, T, H/2]`, float32."""
    angles = positions_RT[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_RTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the two halves of each head against each other; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x_RTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_RTNH.dtype)
