"""Linear maps and norms."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from realjax.core.lora_config import LoRAConfig
from realjax.models import sums
from realjax.models.config import NormConfig
from realjax.models.products import Products


def make_param(shape: tuple[int, ...], names: tuple[str, ...]) -> nnx.Param:
    """Returns a parameter slot with its axis names; `build.init_params` or a checkpoint gives it values."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), out_sharding=names, eager_sharding=False)


class Linear(nnx.Module):
    """x @ kernel (+ bias) over the last `num_in` dims of x, and an adapter beside it where there is one; kernels keep
    heads as a dim of their own.
    """

    def __init__(
        self, in_dims: dict[str, int], out_dims: dict[str, int], bias: bool = False, lora: LoRAConfig | None = None
    ) -> None:
        self.kernel = make_param((*in_dims.values(), *out_dims.values()), (*in_dims, *out_dims))
        # A bias over the model dim is a vector like a norm's scale: never split.
        names = tuple("norm" if name == "embed" else name for name in out_dims)
        self.bias = make_param(tuple(out_dims.values()), names) if bias else None
        self.num_in = len(in_dims)
        if lora is not None:
            self.lora_a = make_param((*in_dims.values(), lora.rank), (*in_dims, "rank"))
            self.lora_b = make_param((lora.rank, *out_dims.values()), ("rank", *out_dims))
        self.scale = None if lora is None else lora.scale

    def __call__(self, x: Array, products: Products, time: str = "time") -> Array:
        """Returns the map of x `[R, T, *I]`, whose second dim is named `time`: `[R, T, *O]`."""
        y = products.over_tokens(partial(self._multiply, products), x, time)
        return y if self.bias is None else sums.add_bias(y, self.bias[...])

    def _multiply(self, products: Products, x: Array) -> Array:
        y = products.matmul(x, self.kernel[...], self.num_in)
        if self.scale is None:
            return y
        low = scale_by_number(products.matmul(x, self.lora_a[...], self.num_in), self.scale)
        return y + products.matmul(low, self.lora_b[...])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, over the last dims of x; statistics in float32 (arXiv:1910.07467)."""

    def __init__(self, dims: dict[str, int], config: NormConfig) -> None:
        scale = make_param(tuple(dims.values()), tuple(dims))
        if config.one_plus:
            self.scale_less_one = scale
        else:
            self.scale = scale
        self.eps, self.one_plus, self.dims = config.eps, config.one_plus, tuple(range(-len(dims), 0))

    def __call__(self, x: Array, products: Products, time: str = "time") -> Array:
        """Returns the normed x `[R, T, ..., *D]`, whose second dim is named `time`."""
        return products.over_tokens(self._normalise, x, time)

    def _normalise(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=self.dims, keepdims=True) + self.eps)
        if self.one_plus:
            # In float32 to the end: in 16 bits, 1 + w would lose most of w.
            return sums.scale_by(x32 * inverse_rms, 1 + self.scale_less_one[...].astype(jnp.float32)).astype(x.dtype)
        return sums.scale_by((x32 * inverse_rms).astype(x.dtype), self.scale[...])


class LayerNorm(nnx.Module):
    """(x - mean(x)) / deviation(x) * scale + bias over the last dims of x, all in float32 (arXiv:1607.06450)."""

    def __init__(self, dims: dict[str, int], config: NormConfig) -> None:
        self.scale, self.bias = (make_param(tuple(dims.values()), tuple(dims)) for _ in range(2))
        self.eps, self.dims = config.eps, tuple(range(-len(dims), 0))

    def __call__(self, x: Array, products: Products, time: str = "time") -> Array:
        """Returns the normed x `[R, T, ..., *D]`, whose second dim is named `time`."""
        return products.over_tokens(self._normalise, x, time)

    def _normalise(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=self.dims, keepdims=True)
        inverse_deviation = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=self.dims, keepdims=True) + self.eps)
        scaled = sums.scale_by(centred * inverse_deviation, self.scale[...].astype(jnp.float32))
        return sums.add_bias(scaled, self.bias[...].astype(jnp.float32)).astype(x.dtype)


Norm = RMSNorm | LayerNorm
NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(dims: dict[str, int], config: NormConfig) -> Norm:
    """Returns the norm that `config` describes over last dims of these names and sizes."""
    return NORMS[config.kind](dims, config)


def scale_by_number(x: Array, scale: float) -> Array:
    """Returns x times a number, which is not rounded to the type of x before."""
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)
