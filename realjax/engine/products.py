"""How a platform computes a model's products best. What XLA's CPU backend does badly is known in this file."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from realjax.core.axes import Rules, in_use_rules
from realjax.core.layout import Layout
from realjax.engine.experts import share_experts
from realjax.engine.groups import multiply_padded, sum_padded
from realjax.engine.manual_axes import run_on_own_parts
from realjax.models import heads, sums
from realjax.models.products import Products


def make_products(rules: Rules, layout: Layout) -> Products:
    """Returns the products for the layout's devices, where activations are split as the rules say."""
    is_cpu = layout.devices[0].platform == "cpu"
    share_fn = partial(share_experts, can_send=not is_cpu)
    over_experts = partial(run_on_own_parts, rules=in_use_rules(rules), layout=layout, share_fn=share_fn)
    if not is_cpu:
        # Rows and time stay apart: merged, an accelerator's sums under sequence parallelism would not be scattered.
        grouped_matmul = partial(sums.grouped_matmul, group_fn=multiply_padded, group_sum_fn=sum_padded)
        return Products(grouped_matmul=grouped_matmul, over_experts=over_experts)

    def over_tokens(fn: Callable[[Array], Array], x: Array, time: str) -> Array:
        return fn(x) if rules[time] else merge_tokens(fn, x)

    return Products(
        matmul=multiply_flat,
        grouped_matmul=partial(sums.grouped_matmul, group_fn=multiply_blocks, group_sum_fn=sum_blocks),
        over_tokens=over_tokens,
        over_experts=over_experts,
        tied_logits=read_table,
        share=compute_once,
    )


def unrolls_layers(layout: Layout, *, remat: bool) -> bool:
    """Returns whether layers compiled one by one are quicker here than a loop over stacks of them."""
    # The stacks' copies cost a CPU a sixth of a step. But what remat computes anew, XLA there merges with the first
    # time, unless a loop's border lies between.
    return layout.devices[0].platform == "cpu" and not remat


def adds_in_place(layout: Layout, *, unroll: bool) -> bool:
    """Returns whether gradients are best added layer by layer to the stacked totals of micro-batches."""
    # A CPU's compiler takes half as long again for it where layers are no loop, and saves no memory.
    return layout.devices[0].platform != "cpu" or not unroll


def writes_moments_first(layout: Layout) -> bool:
    """Returns whether an update is best computed as the new moments, and then the parameters from these."""
    # XLA's CPU backend writes one array a loop: where a loop for the parameters computes the moments anew, it keeps a
    # copy of the old ones.
    return layout.devices[0].platform == "cpu"


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


def compute_once(x: Array) -> Array:
    """Returns x, computed once for all that read it, as exact sums of one number and zeros.

    XLA's CPU backend computes it in each loop that reads it, such as sines for each head and layer, and drops barriers
    before it does; a product it leaves out of loops.
    """
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision="highest")


BLOCK_LEN = 128  # rows of a group that are multiplied at once, at most


@dataclass(frozen=True)
class Blocks:
    """Groups of rows, one after another, cut in blocks of `size` rows, of which a group's last has rows of others too.

    A loop over blocks reads the kernels of groups that have rows once for each, and takes as long as the products:
    XLA's CPU backend multiplies all rows by all kernels (`ragged_dot`: 10 times as long with 8 groups, 50 with 64).
    """

    size: int
    ends: Array  # [E] of the groups
    block_ends: Array  # [E] the same, counted in blocks

    @classmethod
    def of(cls, num_rows: int, sizes: Array) -> "Blocks":
        """Returns the blocks of groups of these sizes `[E]` among as many rows, or more."""
        size = min(BLOCK_LEN, max(8, 1 << (num_rows // len(sizes)).bit_length()))
        return cls(size, jnp.cumsum(sizes), jnp.cumsum(-(-sizes // size)))

    def find(self, number: Array, sizes: Array) -> tuple[Array, Array]:
        """Returns the group of a block and its first row."""
        group = jnp.sum(self.block_ends <= number)
        num_left = self.block_ends[group] - number
        first = self.ends[group] - sizes[group] + (-(-sizes[group] // self.size) - num_left) * self.size
        return group, first

    def cut(self, x: Array, first: Array) -> Array:
        """Returns a block's rows of x, which has as many more at its end."""
        return jax.lax.dynamic_slice_in_dim(x, first, self.size)

    def pad(self, x: Array) -> Array:
        """Returns x with room for a block at its end."""
        return jnp.pad(x, ((0, self.size), (0, 0)))


def multiply_blocks(x: Array, kernels: Array, sizes: Array, is_turned: bool) -> Array:
    """As `sums.multiply_groups`."""
    blocks = Blocks.of(len(x), sizes)
    padded = blocks.pad(x)

    def multiply(number: Array, y: Array) -> Array:
        group, first = blocks.find(number, sizes)
        dims = (((1,), (1 if is_turned else 0,)), ((), ()))
        part = jax.lax.dot_general(blocks.cut(padded, first), kernels[group], dims)
        # Of rows that belong to groups behind, whose own blocks come later.
        return jax.lax.dynamic_update_slice_in_dim(y, part, first, 0)

    y = jnp.zeros((len(padded), kernels.shape[1 if is_turned else 2]), x.dtype)
    return jax.lax.fori_loop(0, blocks.block_ends[-1], multiply, y)[: len(x)]


def sum_blocks(x: Array, y: Array, sizes: Array) -> Array:
    """As `sums.sum_groups`."""
    blocks = Blocks.of(len(x), sizes)
    padded_x, padded_y = blocks.pad(x), blocks.pad(y)

    def add(number: Array, totals: Array) -> Array:
        group, first = blocks.find(number, sizes)
        is_own = first + jnp.arange(blocks.size) < blocks.ends[group]
        own = jnp.where(is_own[:, None], blocks.cut(padded_x, first), 0)
        return totals.at[group].add(sum_widened(own, blocks.cut(padded_y, first), 1))

    totals = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.block_ends[-1], add, totals)
