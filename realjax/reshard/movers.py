"""The ways in which a leaf reaches its destination, and which of them it takes."""

from functools import lru_cache
from itertools import pairwise

import jax
from jax import Array

from realjax.reshard.exchange import exchange, make_schedule
from realjax.reshard.host import copy_on_host
from realjax.reshard.plan import LeafPlan, ReshardPlan, memory_kind


def find_route(leaf: LeafPlan) -> str:
    """Returns the key in `MOVERS` for a leaf; it follows from the plan, so that every process takes the same."""
    spec = leaf.spec
    if spec.source == spec.destination and spec.dtype == spec.source_dtype:
        return "stay"
    if not spec.is_relayout and memory_kind(spec.source) != memory_kind(spec.destination):
        return "change_kind"
    if leaf.is_wrap:
        return "wrap"
    on_cpu = next(iter(spec.source.device_set)).platform == "cpu"
    return "host" if on_cpu and leaf.stays_in_process else "exchange"


@lru_cache(maxsize=256)
def make_bundles(plan: ReshardPlan, chunk_bytes: int) -> tuple[tuple[int, ...], ...]:
    """Returns bundles of leaf indices: those exchanged between the same devices together up to a chunk, all others
    alone.
    """
    bundles: list[list[int]] = []
    room, previous = 0, None
    for index, leaf in enumerate(plan.leaves):
        devices, staged = None, chunk_bytes
        if find_route(leaf) == "exchange":
            schedule = make_schedule(leaf, chunk_bytes)
            devices = leaf.spec.source.device_set, leaf.spec.destination.device_set
            staged = schedule.slab_bytes if schedule.num_slabs == 1 else chunk_bytes
        if devices is not None and devices == previous and staged <= room:
            bundles[-1].append(index)
        else:
            bundles.append([index])
            room = chunk_bytes
        room, previous = room - staged, devices
    return tuple(map(tuple, bundles))


def staged_bytes(plan: ReshardPlan, chunk_bytes: int) -> int:
    """Returns the most bytes that a device holds beside its sources and destinations: those of two bundles in a row."""
    sizes = [
        sum(make_schedule(plan.leaves[i], chunk_bytes).slab_bytes for i in bundle)
        if find_route(plan.leaves[bundle[0]]) == "exchange"
        else 0
        for bundle in make_bundles(plan, chunk_bytes)
    ]
    return max((first + second for first, second in pairwise([0, *sizes])), default=0)


def _stay(leaves: list[LeafPlan], arrays: list[Array], free_source: bool, chunk_bytes: int) -> list[Array]:
    return list(arrays)


def _wrap(leaves: list[LeafPlan], arrays: list[Array], free_source: bool, chunk_bytes: int) -> list[Array]:
    """Returns arrays made of the shards that are in place already, and frees those that are not needed."""
    results = []
    for leaf, array in zip(leaves, arrays):
        spec, shards = leaf.spec, [s.data for s in array.addressable_shards]
        wanted = [s for s in shards if s.device in spec.destination.device_set]
        results.append(jax.make_array_from_single_device_arrays(spec.shape, spec.destination, wanted, dtype=spec.dtype))
        for shard in shards if free_source else ():
            if shard.device not in spec.destination.device_set:
                shard.delete()
    return results


def _change_kind(leaves: list[LeafPlan], arrays: list[Array], free_source: bool, chunk_bytes: int) -> list[Array]:
    results = [jax.device_put(array, leaf.spec.destination) for leaf, array in zip(leaves, arrays)]
    if free_source:
        # A copy between kinds of memory may still be reading: only a finished one lets go of its source.
        jax.block_until_ready(results)
        _delete(arrays)
    return results


def _host(leaves: list[LeafPlan], arrays: list[Array], free_source: bool, chunk_bytes: int) -> list[Array]:
    results = []
    for leaf, array in zip(leaves, arrays):
        results.append(copy_on_host(leaf, array))
        if free_source:
            array.delete()
    return results


def _exchange(leaves: list[LeafPlan], arrays: list[Array], free_source: bool, chunk_bytes: int) -> list[Array]:
    """Returns the relaid arrays. Pinned host memory is reached through the devices: kind and layout change in turn."""
    on_device = [_to_kind(array, "device") for array in arrays]
    if free_source and memory_kind(leaves[0].spec.source) != "device":
        jax.block_until_ready(on_device)
        _delete(arrays)
    schedules = tuple(make_schedule(leaf, chunk_bytes) for leaf in leaves)
    results = exchange(schedules, on_device, lambda: _delete(arrays if free_source else []))
    return [_to_kind(array, memory_kind(leaf.spec.destination)) for leaf, array in zip(leaves, results)]


def _to_kind(array: Array, kind: str) -> Array:
    return (
        array if memory_kind(array.sharding) == kind else jax.device_put(array, array.sharding.with_memory_kind(kind))
    )


def _delete(arrays: list[Array]) -> None:
    for array in arrays:
        array.delete()


# Every mover takes (leaf plans, arrays, free_source, chunk_bytes) and returns the arrays in their destinations.
MOVERS = {"stay": _stay, "wrap": _wrap, "change_kind": _change_kind, "host": _host, "exchange": _exchange}
