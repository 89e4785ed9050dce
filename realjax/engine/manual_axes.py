"""Mesh axes in our own hands: functions that devices along an axis, or stages, run on their own parts of the arrays.

The other axes stay with XLA. Outside of the tables that place arrays, this is the only file that names mesh axes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from realjax.core.axes import ROW_AXES, Axes, Names, Rules, as_tuple, keep_axes, left_to_split, resolve
from realjax.core.batch import Batch
from realjax.core.layout import Layout
from realjax.core.trees import Tree, map_paths
from realjax.models.products import ExpertsFn, Routed

T, G = TypeVar("T"), TypeVar("G")
WHOLE = PartitionSpec()
ROWS = PartitionSpec(ROW_AXES)
# share_fn(fn, axes) -> fn of a device's own tokens, which all devices along these axes have a part of
ShareFn = Callable[[ExpertsFn, tuple[str, ...]], ExpertsFn]


def find_data_parts(shardings: Tree) -> Tree:
    """Returns the PartitionSpecs of how arrays are split over the axes of rows alone, empty where they are not."""

    def one(sharding: NamedSharding) -> PartitionSpec:
        dims = [keep_axes(axes, ROW_AXES) for axes in sharding.spec]
        return PartitionSpec(*dims) if any(dims) else WHOLE

    return jax.tree.map(one, shardings)


def sum_over_data(
    fn: Callable[[G, Batch], tuple[Tree, T]], layout: Layout, given: G, parts: Tree
) -> Callable[[G, Batch], tuple[Tree, T]]:
    """Returns `fn(given, rows) -> (tree, sums)`, run by each device with rows of its own on these.

    `given` and `parts` are PartitionSpecs: how the first argument and the tree are split over the axes of rows. A leaf
    of the tree is summed over those of them that do not split it; of a leaf that all of them split, each device
    returns its part of the whole sum.
    """

    def stack(x: Array, part: PartitionSpec = WHOLE) -> Array:
        return x[None] if _axes_without(part) else x

    def of_each(given: G, rows: Batch) -> tuple[Tree, T]:
        tree, sums = fn(given, rows)
        return jax.tree.map(stack, tree, parts), jax.tree.map(stack, sums)

    def stacked(part: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(others, *part) if (others := _axes_without(part)) else part

    run = jax.shard_map(
        of_each,
        mesh=layout.mesh,
        in_specs=(given, ROWS),
        out_specs=(jax.tree.map(stacked, parts), ROWS),
        axis_names=set(ROW_AXES),
        check_vma=False,
    )

    def add(x: Array, part: PartitionSpec = WHOLE) -> Array:
        return x.sum(axis=0) if _axes_without(part) else x

    def summed(given: G, rows: Batch) -> tuple[Tree, T]:
        tree, sums = run(given, rows)
        return jax.tree.map(add, tree, parts), jax.tree.map(add, sums)

    return summed


def _axes_without(part: PartitionSpec) -> tuple[str, ...]:
    """Returns the axes of rows that do not split an array."""
    split = {axis for axes in part for axis in as_tuple(axes)}
    return tuple(axis for axis in ROW_AXES if axis not in split)


def has_own_rows() -> bool:
    """Returns whether the code around runs on each device by itself on its own rows, inside `sum_over_data`."""
    return set(ROW_AXES) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def gather_over_data(x: Array, dim: int, axes: Axes, spec: PartitionSpec) -> Array:
    """Returns the parts of all devices along `axes`, those of rows or some of them, joined at `dim`.

    `spec` says how x is split over the other axes, of which those count that are left to XLA.
    """
    return _with_all_axes(lambda x: jax.lax.all_gather(x, axes, axis=dim, tiled=True), x, spec)


def gather_sink(sink: Array, dim: int, axes: Axes, spec: PartitionSpec) -> Array:
    """As `gather_over_data`; the gradient is summed over the devices, each of which gets its part of the sum."""
    return cast(Array, _gather_sink(sink, dim, axes, spec))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_sink(sink: Array, dim: int, axes: Axes, spec: PartitionSpec) -> Array:
    return gather_over_data(sink, dim, axes, spec)


def _scatter(dim: int, axes: Axes, spec: PartitionSpec, _: None, grad: Array) -> tuple[Array]:
    scatter = lambda x: jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    return (_with_all_axes(scatter, grad, spec),)


_gather_sink.defvjp(lambda sink, dim, axes, spec: (gather_over_data(sink, dim, axes, spec), None), _scatter)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def swap_over_data(x: Array, split: int, join: int, spec: PartitionSpec) -> Array:
    """Returns x cut at dim `split`, a part for each device with rows, and what came from each joined at `join`.

    `spec` as for `gather_over_data`.
    """
    return _with_all_axes(lambda x: jax.lax.all_to_all(x, ROW_AXES, split, join, tiled=True), x, spec)


swap_over_data.defvjp(
    lambda x, split, join, spec: (swap_over_data(x, split, join, spec), None),
    lambda split, join, spec, _, grad: (swap_over_data(grad, join, split, spec),),
)


def _with_all_axes(fn: Callable[[Array], Array], x: Array, spec: PartitionSpec) -> Array:
    """Returns fn(x), run with all mesh axes in our hands: XLA would make x whole along those that it has."""
    mesh = jax.sharding.get_abstract_mesh()
    rest = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=rest, check_vma=False)(x)


def gathers(primitive: Primitive) -> bool:
    """Returns whether an operation is that of `gather_over_data`, for a rule of what a backward pass keeps."""
    return primitive is jax.lax.all_gather_p


def share_rows(fn: Callable[..., T], layout: Layout, num_rows: int) -> Callable[..., T]:
    """Returns `fn` of arrays with that many rows, run by every device on its share of them.

    Where the rows do not divide over all devices, those share them that have rows of their own.
    """
    divides = num_rows % layout.strategy.size == 0
    rows = PartitionSpec((*ROW_AXES, "tensor", "pipe")) if divides else ROWS
    return jax.shard_map(fn, mesh=layout.mesh, in_specs=rows, out_specs=rows, check_vma=False)


def on_shards(fn: Callable[..., T], cache: NamedSharding, num_caches: int) -> Callable[..., T]:
    """Returns `fn`, run by every device on its own part of the arrays; results lie as a cache does.

    The first `num_caches` arguments lie as a cache does; the others are of rows.
    """

    def run(*args: object) -> T:
        specs = tuple(cache.spec if i < num_caches else ROWS for i in range(len(args)))
        return jax.shard_map(fn, mesh=cache.mesh, in_specs=specs, out_specs=cache.spec, check_vma=False)(*args)

    return run


def on_own_heads(fn: Callable[..., Array], layout: Layout) -> Callable[..., Array]:
    """Returns `fn(q, k, v, segment_ids, sinks)`, run by every device on its own rows and heads alone.

    For what XLA cannot split by itself. Axes that are in our hands already have split the arrays before.
    """

    def run(*args: Array | None) -> Array:
        inner = jax.sharding.get_abstract_mesh()
        mesh = layout.mesh if inner.empty else inner
        left = set(mesh.axis_names) - set(inner.manual_axes)
        if not left or layout.strategy.size == 1:
            return fn(*args)
        rows, of_heads = keep_axes(ROW_AXES, left), "tensor" if "tensor" in left else None
        heads = PartitionSpec(rows, None, of_heads)
        in_specs = (heads, heads, heads, PartitionSpec(rows), PartitionSpec(of_heads))
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=heads, axis_names=left, check_vma=False)
        return mapped(*args)

    return run


def run_on_own_parts(
    fn: ExpertsFn, routed: Routed, params: Tree, names: Tree, *, rules: Rules, layout: Layout, share_fn: ShareFn
) -> Array:
    """Returns `fn(routed, params)`, run by every device on its own rows and its own parts of the parameters, by their
    dims' `names`; where each has a part of the hidden numbers, what they return is summed.

    Where devices share experts, `share_fn` makes of `fn` and the axes along which tokens are split a function of these
    tokens: they are split over `tensor` too where they divide, and what is summed comes back split.
    """
    inner = jax.sharding.get_abstract_mesh()
    mesh = layout.mesh if inner.empty else inner
    left = {axis for axis in mesh.axis_names if axis not in inner.manual_axes and mesh.shape[axis] > 1}
    rows, tensor = keep_axes(ROW_AXES, left), keep_axes("tensor", left)
    tokens = PartitionSpec(rows)
    if is_shared := layout.strategy.ep > 1:
        tokens = _split_tokens(routed, mesh, rows) if tensor else tokens
        fn = share_fn(fn, ("expert",) if tokens is None or not tensor else ("expert", "tensor"))
    if not left:
        return fn(routed, params)

    def find_spec(path: str, leaf: Array, dims: Names) -> PartitionSpec:
        spec = resolve(dims, leaf.shape, left_to_split(rules), layout, path)
        return PartitionSpec(*(keep_axes(axes, left) for axes in spec))

    specs = map_paths(find_spec, params, names)
    run = partial(jax.shard_map, mesh=mesh, axis_names=left, check_vma=False)
    if tensor is None or (is_shared and tokens is not None):
        return run(fn, in_specs=(tokens, specs), out_specs=tokens)(routed, params)
    # A dim for the devices that each have a part of the sum: XLA then adds up the parts, and the gradients of what all
    # of them read, in a way that suits what comes next, and in 16 bits too.
    parts = PartitionSpec(tensor, rows)
    of_each = lambda routed, params: fn(jax.tree.map(lambda x: x[0], routed), params)[None]
    every = jax.tree.map(lambda x: jnp.broadcast_to(x, (mesh.shape["tensor"], *x.shape)), routed)
    y = run(of_each, in_specs=(parts, specs), out_specs=parts)(every, params)
    return jax.lax.reduce(y, jnp.zeros((), y.dtype), jax.lax.add, (0,))


def _split_tokens(routed: Routed, mesh: AbstractMesh | Mesh, rows: Axes) -> PartitionSpec | None:
    """Returns how tokens `[R, T, D]` are split over `tensor` too: along the row, or else by rows. None: not at all."""
    num_parts, (num_rows, row_len, _) = mesh.shape["tensor"], routed.x.shape
    if row_len % num_parts == 0:
        return PartitionSpec(rows, "tensor")
    by_row = (*as_tuple(rows), "tensor")
    divides = num_rows % math.prod(mesh.shape[axis] for axis in by_row) == 0
    return PartitionSpec(by_row) if divides else None


def find_share() -> tuple[Array, int]:
    """Returns which part of the experts this device has, and of how many."""
    return jax.lax.axis_index("expert"), jax.lax.axis_size("expert")


def gather_tokens(x: Array, axes: Axes) -> Array:
    """Returns the tokens `x` `[n, ...]` of all devices along `axes`, one after another."""
    return cast(Array, _gather_tokens(x, axes))


def sum_tokens(y: Array, axes: Axes) -> Array:
    """Returns the sums of what all devices along `axes` have for each token, `[N, ...]`: to each those of its own.

    What crosses is of y's dtype, and as much as in a reduce-scatter; the sums are in float32.
    """
    return cast(Array, _sum_tokens(y, axes))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_tokens(x: Array, axes: Axes) -> Array:
    return jax.lax.all_gather(x, axes, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_tokens(y: Array, axes: Axes) -> Array:
    parts = y.reshape(jax.lax.axis_size(axes), -1, *y.shape[1:])
    parts = jax.lax.all_to_all(parts, axes, 0, 0, tiled=True)
    return parts.sum(axis=0, dtype=jnp.float32).astype(y.dtype)


_gather_tokens.defvjp(lambda x, axes: (gather_tokens(x, axes), None), lambda axes, _, grad: (sum_tokens(grad, axes),))
_sum_tokens.defvjp(lambda y, axes: (sum_tokens(y, axes), None), lambda axes, _, grad: (gather_tokens(grad, axes),))


def gather_shares(x: Array) -> Array:
    """Returns `x` of all devices that share experts, stacked."""
    return jax.lax.all_gather(x, "expert")


def send_rows(x: Array, num_rows: int, starts: Array, sizes: Array, places: Array, arriving: Array) -> Array:
    """Returns `[num_rows, ...]` rows that came from the devices that share experts, 0 where none did.

    To each of them go `sizes` of this one's rows, from `starts` on, and lie there from `places` on; `arriving` come
    from each. Accelerators alone can.
    """
    into = jnp.zeros((num_rows, *x.shape[1:]), x.dtype)
    return jax.lax.ragged_all_to_all(x, into, starts, sizes, places, arriving, axis_name="expert")


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


def hand_back(x: Array, num_stages: int) -> Array:
    """Returns what the stage behind hands back; the last gets zeros."""
    return jax.lax.ppermute(x, "pipe", [(stage + 1, stage) for stage in range(num_stages - 1)])
