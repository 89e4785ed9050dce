"""What a model multiplies and norms with: functions that it is given, since platforms differ in what they do well.

The defaults are the plain forms; `engine/products.py` has those of a platform.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from realjax.models import sums


class MatmulFn(Protocol):
    """As `sums.matmul`."""

    def __call__(self, x: Array, kernel: Array, num_in: int = 1, dtype: DTypeLike | None = None) -> Array: ...


# over_tokens(fn, x_RT..., time) -> fn's result; fn treats tokens alike, and `time` is the axis name of x's second dim.
OverTokensFn = Callable[[Callable[[Array], Array], Array, str], Array]


def apply_as_it_is(fn: Callable[[Array], Array], x: Array, time: str) -> Array:
    """Returns `fn(x)`, rows and time apart."""
    return fn(x)


def tied_logits(hidden_BD: Array, table_VD: Array) -> Array:
    """Returns the float32 logits `[B, V]` of a head that is the embedding table."""
    return jnp.matmul(hidden_BD, table_VD.T, preferred_element_type=jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Products:
    """Three functions, any of which a platform may replace by one of the same result."""

    matmul: MatmulFn = sums.matmul
    over_tokens: OverTokensFn = apply_as_it_is
    tied_logits: Callable[[Array, Array], Array] = tied_logits
