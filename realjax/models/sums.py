"""What sums over tokens in its backward pass, summed in float32 whatever the compute dtype.

A 16-bit sum stops growing: 256 + 1 is 256 in bfloat16. And what is summed over tokens is summed over devices next, in
the type it then has.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from realjax.core.trees import Tree, flatten_paths, map_paths


@jax.custom_vjp
def collect(value: Array, sink: Array) -> Array:
    """Returns `value`, whose gradient goes to `sink` instead, an array of its shape, in the sink's dtype.

    So the gradients of many uses of one 16-bit array are summed in float32. The sink itself is never read.
    """
    return value


def _collect_forward(value: Array, sink: Array) -> tuple[Array, Array]:
    return value, jnp.zeros((), sink.dtype)


collect.defvjp(_collect_forward, lambda of_dtype, grad: (None, grad.astype(of_dtype.dtype)))


def collect_tree(params: Tree, sinks: Tree) -> Tree:
    """Returns parameters of which those that have a sink, at their path, are collected; others have no gradient."""
    found = flatten_paths(sinks)
    return map_paths(lambda path, x: collect(x, found[path]) if path in found else x, params)


# sum_fn(y [*B, *O], x [*B, *I], num_lead) -> the sum over the leading dims B of their products, float32 [*O, *I].
SumFn = Callable[[Array, Array, int], Array]


def sum_products(y: Array, x: Array, num_lead: int) -> Array:
    """Returns the sum over the leading dims of y `[*B, *O]` times x `[*B, *I]`: float32 `[*O, *I]`."""
    lead = tuple(range(num_lead))
    return jax.lax.dot_general(y, x, ((lead, lead), ((), ())), preferred_element_type=jnp.float32)


def matmul(
    x: Array, kernel: Array, num_in: int = 1, dtype: DTypeLike | None = None, sum_fn: SumFn = sum_products
) -> Array:
    """Returns x `[..., *I]` times kernel `[*I, *O]` over `num_in` dims: `[..., *O]`, of their dtype or `dtype`.

    `sum_fn` sums the kernel's gradient.
    """
    return cast(Array, _matmul(x, kernel, num_in, dtype, sum_fn))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(x: Array, kernel: Array, num_in: int, dtype: DTypeLike | None, sum_fn: SumFn) -> Array:
    return jnp.tensordot(x, kernel, num_in, preferred_element_type=dtype)


def _matmul_forward(
    x: Array, kernel: Array, num_in: int, dtype: DTypeLike | None, sum_fn: SumFn
) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel, num_in, dtype, sum_fn), (x, kernel)


def _matmul_backward(
    num_in: int, dtype: DTypeLike | None, sum_fn: SumFn, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    grad = grad.astype(x.dtype)
    num_lead, num_out = x.ndim - num_in, kernel.ndim - num_in
    out = tuple(range(num_lead, grad.ndim))
    grad_x = jax.lax.dot_general(grad, kernel, ((out, tuple(range(num_in, kernel.ndim))), ((), ())))
    # [*O, *I], as JAX itself has it: the other way round may cost another transposition.
    order = (*range(num_out, kernel.ndim), *range(num_out))
    return grad_x, sum_fn(grad, x, num_lead).transpose(order).astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


# group_fn(x [P, I], kernels [E, I, O], sizes [E], is_turned) -> [P, O]; turned, kernels are [E, O, I].
GroupFn = Callable[[Array, Array, Array, bool], Array]
# group_sum_fn(x [P, I], y [P, O], sizes [E]) -> the sums of their products in each group, float32 [E, I, O]
GroupSumFn = Callable[[Array, Array, Array], Array]


def multiply_groups(x: Array, kernels: Array, sizes: Array, is_turned: bool) -> Array:
    """Returns the rows of x, one group after another, each times its group's kernel."""
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2 if is_turned else 1,)), ((), ())), [0], [0])
    return jax.lax.ragged_dot_general(x, kernels, sizes, dims)


def sum_groups(x: Array, y: Array, sizes: Array) -> Array:
    """Returns for each group the sum over its rows of x times y."""
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(x, y, sizes, dims, preferred_element_type=jnp.float32)


def grouped_matmul(
    x: Array,
    kernels: Array,
    sizes: Array,
    group_fn: GroupFn = multiply_groups,
    group_sum_fn: GroupSumFn = sum_groups,
) -> Array:
    """Returns x `[P, I]`, whose first `sizes[0]` rows are of group 0 and so on, times kernels `[E, I, O]`: `[P, O]`.

    Rows of no group, at the end, give 0, as do their gradients. `group_sum_fn` sums the kernels' gradients.
    """
    return cast(Array, _grouped_matmul(x, kernels, sizes, group_fn, group_sum_fn))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(x: Array, kernels: Array, sizes: Array, group_fn: GroupFn, group_sum_fn: GroupSumFn) -> Array:
    return _clear_rest(group_fn(x, kernels, sizes, False), sizes)


def _grouped_forward(
    x: Array, kernels: Array, sizes: Array, group_fn: GroupFn, group_sum_fn: GroupSumFn
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_matmul(x, kernels, sizes, group_fn, group_sum_fn), (x, kernels, sizes)


def _grouped_backward(
    group_fn: GroupFn, group_sum_fn: GroupSumFn, residuals: tuple[Array, Array, Array], grad: Array
) -> tuple[Array, Array, None]:
    x, kernels, sizes = residuals
    grad = grad.astype(x.dtype)
    grad_x = _clear_rest(group_fn(grad, kernels, sizes, True), sizes)
    return grad_x, group_sum_fn(x, grad, sizes).astype(kernels.dtype), None


def _clear_rest(y: Array, sizes: Array) -> Array:
    # What platforms leave in rows of no group differs, and need not be finite.
    return jnp.where(jnp.arange(len(y))[:, None] < sizes.sum(), y, 0)


_grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


@jax.custom_vjp
def permute(x: Array, order: Array, inverse: Array) -> Array:
    """Returns the rows of x in another order, whose `inverse` brings the gradient's back: nothing is summed."""
    return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, grad: (grad[inverse], None, None))


@jax.custom_vjp
def scale_by(x: Array, scale: Array) -> Array:
    """Returns x `[..., *D]` times scale `[*D]`."""
    return x * scale


def _scale_backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, scale = residuals
    products = grad.astype(jnp.float32) * x.astype(jnp.float32)
    return grad * scale, products.sum(axis=tuple(range(x.ndim - scale.ndim))).astype(scale.dtype)


scale_by.defvjp(lambda x, scale: (x * scale, (x, scale)), _scale_backward)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """Returns x `[..., *O]` plus bias `[*O]`."""
    return x + bias


def _add_backward(bias: Array, grad: Array) -> tuple[Array, Array]:
    lead = tuple(range(grad.ndim - bias.ndim))
    return grad, grad.astype(jnp.float32).sum(axis=lead).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, bias), _add_backward)


@jax.custom_vjp
def look_up(table: Array, tokens: Array) -> Array:
    """Returns the rows `[..., D]` of table `[V, D]`; a token outside of it is its first or last."""
    return jnp.take(table, tokens, axis=0, mode="clip")


def _look_up_backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    table, tokens = residuals
    summed = jnp.zeros(table.shape, jnp.float32).at[tokens].add(grad.astype(jnp.float32), mode="clip")
    return summed.astype(table.dtype), None


look_up.defvjp(lambda table, tokens: (look_up(table, tokens), (table, tokens)), _look_up_backward)
