"""Carries a tree of arrays from one set of shardings to another, within memory and bit for bit."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from realjax.core.trees import Tree
from realjax.reshard.movers import MOVERS, find_route, make_bundles, staged_bytes
from realjax.reshard.plan import ReshardPlan, plan_leaves, plan_reshard

CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class ReshardReport:
    """What a move cost. `staged_bytes` is the most that a device held beside its sources and destinations.

    `seconds` is None unless the move was waited for.
    """

    bytes_moved: int
    bytes_kept: int
    staged_bytes: int
    seconds: float | None

    def __str__(self) -> str:
        text = f"moved {self.bytes_moved / 2**20:.1f} MiB, kept {self.bytes_kept / 2**20:.1f} MiB"
        if self.seconds is None or not self.bytes_moved:
            return text
        return f"{text} in {self.seconds:.3f} s ({self.bytes_moved / 1e9 / max(self.seconds, 1e-9):.2g} GB/s)"


Arrays = TypeVar("Arrays")  # a tree of arrays, which keeps its form


def reshard(
    tree: Arrays,
    destination_shardings: object,
    *,
    dtype: DTypeLike | Tree | None = None,
    free_source: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    block: bool = False,
    arrived_fn: Callable[[str, Array], Any] | None = None,
) -> tuple[Arrays, ReshardReport]:
    """Returns the tree in `destination_shardings`, bit for bit, and a report; `dtype` becomes that of floating leaves,
    or each has its own of a tree of dtypes.

    `arrived_fn(path, array)` makes what stands for a leaf in the result, as soon as it has arrived: of a whole tree in
    another form, only the leaves of two bundles are there twice.

    A leaf that is in place is returned itself, and one whose destination shards all exist shares them: drop such a
    result, never `delete()` it. `free_source` deletes a source as soon as it is read, but for what the result shares.
    No device holds more than its sources, its destinations and `chunk_bytes` of pieces under way. Of several processes
    each must make the same call. Raises ValueError for trees that differ and leaves that are no arrays or are freed.
    """
    if chunk_bytes < 1:
        raise ValueError(f"reshard: chunk_bytes={chunk_bytes}; it must be a positive number of bytes")
    check_alive(tree)
    arrays, treedef = jax.tree.flatten(tree)
    plan = plan_reshard(tree, jax.tree.map(lambda a: a.sharding, tree), destination_shardings, dtype=dtype)
    start = time.perf_counter()
    moved: list[Any] = [None] * len(arrays)
    for bundle in _move_bundles(plan, arrays, free_source, chunk_bytes):
        for index, array in bundle.items():
            moved[index] = array if arrived_fn is None else arrived_fn(plan.leaves[index].spec.path, array)
        del array, bundle
    if block:
        jax.block_until_ready(moved)
    report = ReshardReport(
        bytes_moved=plan.bytes_moved,
        bytes_kept=plan.bytes_kept,
        staged_bytes=staged_bytes(plan, _share(chunk_bytes)),
        seconds=time.perf_counter() - start if block else None,
    )
    return jax.tree.unflatten(treedef, moved), report


def ema_update(destination: Arrays, source: object, eta: float, *, chunk_bytes: int = CHUNK_BYTES) -> Arrays:
    """Returns `eta * source + (1 - eta) * destination` in the destination's layout, kind of memory and dtype.

    The source stays as it is; `destination` is consumed. Computed in float32; eta=1 copies and eta=0 keeps bitwise.
    Raises ValueError as `reshard` does, for an eta outside [0, 1], and for a leaf that is the same array in both trees.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ema_update: eta={eta}; it must lie in [0, 1]: the weight of the source")
    check_alive(destination)
    check_alive(source)
    plan = _plan_update(destination, source)
    (olds, treedef), news = jax.tree.flatten(destination), jax.tree.leaves(source)
    for leaf, old, new in zip(plan.leaves, olds, news):
        if old is new:
            raise ValueError(
                f"ema_update '{leaf.spec.path}': source and destination are one array; give the destination its own "
                f"copy"
            )
    results = list(olds)
    for bundle in _move_bundles(plan, news, False, chunk_bytes):
        # A kept copy on the host is brought to the devices for the update, and the new one taken back.
        on_device = [jax.device_put(olds[i], plan.leaves[i].spec.destination) for i in bundle]
        for index, array in zip(bundle, _blend(on_device, list(bundle.values()), eta)):
            results[index] = jax.device_put(array, olds[index].sharding)
            if not olds[index].is_deleted():
                jax.block_until_ready(results[index])
                olds[index].delete()
    return jax.tree.unflatten(treedef, results)


def on_host(shardings: Arrays) -> Arrays:
    """Returns the tree of shardings with the same layout in pinned host memory."""
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings)


def check_alive(tree: object) -> None:
    """Raises ValueError for a leaf that is no jax.Array, or of which a shard has been freed."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, Array):
            raise ValueError(
                f"reshard '{name}': found {type(leaf).__name__}, needs a jax.Array; place it with jax.device_put"
            )
        if leaf.is_deleted() or any(s.data.is_deleted() for s in leaf.addressable_shards):
            raise ValueError(
                f"reshard '{name}': the array is freed (by free_source=True or a donation); "
                "move it from the tree that replaced it"
            )


def _plan_update(destination: object, source: object) -> ReshardPlan:
    """Returns the plan of `source` into the device memory of `destination`, in the dtypes of `destination`."""
    shardings = [jax.tree.map(lambda a: a.sharding, tree) for tree in (source, destination)]
    plan = plan_reshard(source, shardings[0], jax.tree.map(lambda s: s.with_memory_kind("device"), shardings[1]))
    for leaf, old in zip(plan.leaves, jax.tree.leaves(destination)):
        if leaf.spec.shape != old.shape:
            raise ValueError(
                f"ema_update '{leaf.spec.path}': source shape {leaf.spec.shape}, destination shape {old.shape}; "
                "both must be parameters of one architecture"
            )
    olds = jax.tree.leaves(destination)
    return plan_leaves(tuple(replace(leaf.spec, dtype=np.dtype(old.dtype)) for leaf, old in zip(plan.leaves, olds)))


@partial(jax.jit, donate_argnums=0)
def _blend(olds: list[Array], news: list[Array], eta: Array) -> list[Array]:
    def one(old: Array, new: Array) -> Array:
        mixed = eta * new.astype(jnp.float32) + (1 - eta) * old.astype(jnp.float32)
        return jnp.where(eta == 1, new, jnp.where(eta == 0, old, mixed.astype(old.dtype)))

    return [one(old, new) for old, new in zip(olds, news)]


def _share(chunk_bytes: int) -> int:
    """Returns what one bundle may stage: two of them are under way at a time."""
    return max(1, chunk_bytes // 2)


def _move_bundles(
    plan: ReshardPlan, arrays: list[Array], free_source: bool, chunk_bytes: int
) -> Iterator[dict[int, Array]]:
    """Yields the moved leaves by index, bundle by bundle; one has arrived before the second one after it starts."""
    previous: list[Array] = []
    chunk_bytes = _share(chunk_bytes)
    for bundle in make_bundles(plan, chunk_bytes):
        mover = MOVERS[find_route(plan.leaves[bundle[0]])]
        moved = mover([plan.leaves[i] for i in bundle], [arrays[i] for i in bundle], free_source, chunk_bytes)
        jax.block_until_ready(previous)
        previous = moved
        yield dict(zip(bundle, moved))
