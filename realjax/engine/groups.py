"""Products of groups of rows, each with its group's kernel, on accelerators: blocks of one group each, all at once.

XLA multiplies all rows by all kernels (`ragged_dot`: E times the products), with or without its options for it. Here
rows are copied into blocks, whose last one of a group is filled up with 0, and each block's kernel beside it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from realjax.models import sums

# With fewer rows, the kernels take longer to be read than all rows take to be multiplied by all of them.
FEW_ROWS = 2**9
UNIT = 64  # rows: blocks are a multiple of it


@dataclass(frozen=True)
class Blocks:
    """Blocks of P rows, of groups one after another: as many as there can be, whatever the groups' sizes."""

    rows: Array  # [B, S] the row at each place; P where there is none
    groups: Array  # [B]
    places: Array  # [P] where each row is among the blocks' rows; anywhere of a row of no group

    @classmethod
    def of(cls, num_rows: int, sizes: Array) -> "Blocks":
        """Returns the blocks of groups of these sizes `[E]`: half of a group's rows each, if all had as many."""
        num_groups = len(sizes)
        size = -(-num_rows // (2 * num_groups * UNIT)) * UNIT
        ends, num_blocks = jnp.cumsum(sizes), -(-sizes // size)
        block_ends = jnp.cumsum(num_blocks)
        find = lambda ends, at: jnp.minimum(jnp.sum(ends <= at[:, None], axis=1), num_groups - 1)
        numbers, all_rows = jnp.arange(num_rows // size + num_groups), jnp.arange(num_rows)
        group, of_row = find(block_ends, numbers), find(ends, all_rows)
        nth = numbers - (block_ends - num_blocks)[group]
        row = ((ends - sizes)[group] + nth * size)[:, None] + jnp.arange(size)
        is_own = (row < ends[group][:, None]) & (numbers < block_ends[-1])[:, None]
        places = (block_ends - num_blocks)[of_row] * size + all_rows - (ends - sizes)[of_row]
        return cls(jnp.where(is_own, row, num_rows), group, places)

    def cut(self, x: Array) -> Array:
        """Returns the blocks `[B, S, ...]` of rows `[P, ...]`."""
        return x.at[self.rows].get(mode="fill", fill_value=0)


def multiply_padded(x: Array, kernels: Array, sizes: Array, is_turned: bool) -> Array:
    """As `sums.multiply_groups`."""
    if _are_few(x, sizes):
        return sums.multiply_groups(x, kernels, sizes, is_turned)
    blocks = Blocks.of(len(x), sizes)
    dims = (((2,), (2 if is_turned else 1,)), ((0,), (0,)))
    y = jax.lax.dot_general(blocks.cut(x), kernels[blocks.groups], dims)
    return jnp.take(y.reshape(-1, y.shape[2]), blocks.places, axis=0, mode="clip")


def sum_padded(x: Array, y: Array, sizes: Array) -> Array:
    """As `sums.sum_groups`."""
    if _are_few(x, sizes):
        return sums.sum_groups(x, y, sizes)
    blocks = Blocks.of(len(x), sizes)
    dims = (((1,), (1,)), ((0,), (0,)))
    of_blocks = jax.lax.dot_general(blocks.cut(x), blocks.cut(y), dims, preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(of_blocks, blocks.groups, len(sizes), indices_are_sorted=True)


def _are_few(x: Array, sizes: Array) -> bool:
    return len(x) < FEW_ROWS or len(sizes) < 3
