"""Mesh axes in our own hands: functions that devices along an axis, or stages, run on their own parts of the arrays.

The other axes stay with XLA. Outside of the tables that place arrays, this is the only file that names mesh axes.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import Array
from jax.sharding import PartitionSpec

from realjax.core.layout import Layout

T = TypeVar("T")
WHOLE = PartitionSpec()


def sum_over_data(fn: Callable[..., T], layout: Layout) -> Callable[..., T]:
    """Returns `fn(whole, rows)`, run by each device along `data` on its own rows; its results are summed over them."""
    of_each = jax.shard_map(
        lambda *args: jax.tree.map(lambda x: x[None], fn(*args)),
        mesh=layout.mesh,
        in_specs=(WHOLE, PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )
    return lambda *args: jax.tree.map(lambda x: x.sum(axis=0), of_each(*args))


def share_rows(fn: Callable[..., T], layout: Layout, num_rows: int) -> Callable[..., T]:
    """Returns `fn` of arrays with that many rows, run by every device on its share of them.

    Where the rows do not divide over all devices, those along `data` share them.
    """
    divides = num_rows % layout.strategy.size == 0
    rows = PartitionSpec(("data", "tensor", "pipe") if divides else "data")
    return jax.shard_map(fn, mesh=layout.mesh, in_specs=rows, out_specs=rows, check_vma=False)


def data_index() -> Array:
    """Returns the number of this device along `data`, where that axis is in our hands."""
    return jax.lax.axis_index("data")


def over_stages(fn: Callable[..., T], layout: Layout, num_split: int) -> Callable[..., T]:
    """Returns `fn`, run by every stage of the pipeline, with the results `[1, ...]` stacked over the stages.

    The first `num_split` arguments are split over the stages on their leading dim, the others whole.
    """

    def run(*args: object) -> T:
        # Where an axis is in our hands already, the mesh is that of the code around.
        inner = jax.sharding.get_abstract_mesh()
        mapped = jax.shard_map(
            fn,
            mesh=layout.mesh if inner.empty else inner,
            in_specs=tuple(PartitionSpec("pipe") if i < num_split else WHOLE for i in range(len(args))),
            out_specs=PartitionSpec("pipe"),
            axis_names={"pipe"},
            check_vma=False,
        )
        return mapped(*args)

    return run


def stage_index() -> Array:
    """Returns the number of this stage, inside `over_stages`."""
    return jax.lax.axis_index("pipe")


def hand_on(x: Array, num_stages: int, *, is_ring: bool) -> Array:
    """Returns what the stage before hands on; the first gets it from the last in a ring, else zeros."""
    receivers = range(1, num_stages + is_ring)
    return jax.lax.ppermute(x, "pipe", [(stage - 1, stage % num_stages) for stage in receivers])
