"""What a model multiplies and norms with: functions that it is given, since platforms differ in what they do well.

The defaults are the plain forms; `engine/products.py` has those of a platform.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from realjax.core.trees import Tree
from realjax.models import sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routed:
    """Tokens `[R, T, D]`, and for each the numbers of its experts and their weights `[R, T, k]`, float32.

    A token of no expert, such as padding, has numbers E.
    """

    x: Array
    ids: Array
    weights: Array


# experts_fn(routed, params) -> [R, T, D]: what a token's experts give, by their weights; of parts of their parameters
# it is a part of the sum.
ExpertsFn = Callable[[Routed, Tree], Array]


class MatmulFn(Protocol):
    """As `sums.matmul`."""

    def __call__(self, x: Array, kernel: Array, num_in: int = 1, dtype: DTypeLike | None = None) -> Array: ...


class GroupedMatmulFn(Protocol):
    """As `sums.grouped_matmul`."""

    def __call__(self, x: Array, kernels: Array, sizes: Array) -> Array: ...


class OverExpertsFn(Protocol):
    """Runs experts where their tokens and parameters lie."""

    def __call__(self, fn: ExpertsFn, routed: Routed, params: Tree, names: Tree) -> Array:
        """Returns `fn(routed, params)`; the parameters' dims have these `names`."""
        ...


# over_tokens(fn, x_RT..., time) -> fn's result; fn treats tokens alike, and `time` is the axis name of x's second dim.
OverTokensFn = Callable[[Callable[[Array], Array], Array, str], Array]


def apply_as_it_is(fn: Callable[[Array], Array], x: Array, time: str) -> Array:
    """Returns `fn(x)`, rows and time apart."""
    return fn(x)


def run_as_it_is(fn: ExpertsFn, routed: Routed, params: Tree, names: Tree) -> Array:
    """Returns `fn(routed, params)` where all experts are whole."""
    return fn(routed, params)


def tied_logits(hidden_BD: Array, table_VD: Array) -> Array:
    """Returns the float32 logits `[B, V]` of a head that is the embedding table."""
    return jnp.matmul(hidden_BD, table_VD.T, preferred_element_type=jnp.float32)


def share_as_it_is(x: Array) -> Array:
    """Returns x; a compiler may compute it anew in each layer."""
    return x


@dataclass(frozen=True, kw_only=True)
class Products:
    """Functions, any of which a platform may replace by one of the same result."""

    matmul: MatmulFn = sums.matmul
    grouped_matmul: GroupedMatmulFn = sums.grouped_matmul
    over_tokens: OverTokensFn = apply_as_it_is
    over_experts: OverExpertsFn = run_as_it_is
    tied_logits: Callable[[Array, Array], Array] = tied_logits
    share: Callable[[Array], Array] = share_as_it_is  # what all layers read
