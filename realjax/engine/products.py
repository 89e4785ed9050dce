"""How a platform computes a model's products best. What XLA's CPU backend does badly is known in this file."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from realjax.core.axes import Rules
from realjax.core.layout import Layout
from realjax.models import heads, sums
from realjax.models.products import Products


def make_products(rules: Rules, layout: Layout) -> Products:
    """Returns the products for the layout's devices, where activations are split as the rules say."""
    if layout.devices[0].platform != "cpu":
        # Rows and time stay apart: merged, an accelerator's sums under sequence parallelism would not be scattered.
        return Products()

    def over_tokens(fn: Callable[[Array], Array], x: Array, time: str) -> Array:
        return fn(x) if rules[time] else merge_tokens(fn, x)

    return Products(matmul=multiply_flat, over_tokens=over_tokens, tied_logits=read_table)


def unrolls_layers(layout: Layout, *, remat: bool) -> bool:
    """Returns whether layers compiled one by one are quicker here than a loop over stacks of them."""
    # The stacks' copies cost a CPU a sixth of a step. But what remat computes anew, XLA there merges with the first
    # time, unless a loop's border lies between.
    return layout.devices[0].platform == "cpu" and not remat


def adds_in_place(layout: Layout, *, unroll: bool) -> bool:
    """Returns whether gradients are best added layer by layer to the stacked totals of micro-batches."""
    # A CPU's compiler takes half as long again for it where layers are no loop, and saves no memory.
    return layout.devices[0].platform != "cpu" or not unroll


def chunk_bytes(layout: Layout, *, is_kept: bool) -> int:
    """Returns the float32 logits that a device may hold at once; `is_kept`: until a backward pass of XLA's making."""
    # XLA's CPU backend lets that pass not reuse the logits' memory of the forward pass.
    return heads.CHUNK_BYTES // 2 if is_kept and layout.devices[0].platform == "cpu" else heads.CHUNK_BYTES


def merge_tokens(fn: Callable[[Array], Array], x: Array) -> Array:
    """Returns `fn(x)` computed over rows and time as one dim.

    Apart, gradients of products take half as long again, and sums of `[1, T, D]` over tokens ten times as long.
    """
    y = fn(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def multiply_flat(x: Array, kernel: Array, num_in: int = 1, dtype: DTypeLike | None = None) -> Array:
    """As `sums.matmul`; merged tokens are multiplied by a kernel `[I, O]` whose heads are merged too."""
    if x.ndim - num_in > 1:
        return sums.matmul(x, kernel, num_in, dtype, sum_widened)
    num_inputs, out = math.prod(kernel.shape[:num_in]), kernel.shape[num_in:]
    y = sums.matmul(x.reshape(-1, num_inputs), kernel.reshape(num_inputs, -1), 1, dtype, sum_widened)
    return y.reshape(-1, *out)


def sum_widened(y: Array, x: Array, num_lead: int) -> Array:
    """As `sums.sum_products`. 16-bit products are computed in float32 anyway, but not every shape may end there."""
    return sums.sum_products(y.astype(jnp.float32), x.astype(jnp.float32), num_lead)


def read_table(hidden_BD: Array, table_VD: Array) -> Array:
    """As `products.tied_logits`, the table as it lies, on the left.

    With few rows the transposed table takes half as long again, which is what becomes of this without the barriers.
    """
    barrier = jax.lax.optimization_barrier
    return barrier(jnp.matmul(table_VD, barrier(hidden_BD.T), preferred_element_type=jnp.float32)).T
