"""Which pieces of a tree move from which device to which: pure description, no array is touched.

A piece is the intersection of a source shard with a destination shard. Every process computes the same plan, because it
follows from the global shardings alone.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, product
from math import gcd, prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike

from realjax.core.trees import Tree

Box = tuple[tuple[int, int], ...]  # (start, stop) of every dim, in the coordinates of the whole array


@dataclass(frozen=True, kw_only=True)
class Move:
    """One piece: `destination` reads `box` of the array from `source`, which may be the same device."""

    source: jax.Device
    destination: jax.Device
    box: Box


@dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """One array before and after: `source_dtype` in `source`, `dtype` in `destination`."""

    path: str
    shape: tuple[int, ...]
    source_dtype: np.dtype
    dtype: np.dtype
    source: Sharding
    destination: Sharding

    @property
    def wire_dtype(self) -> np.dtype:
        """The narrower of the two dtypes: narrowing happens before the move, widening after it."""
        return min(self.dtype, self.source_dtype, key=lambda d: d.itemsize)

    @property
    def is_relayout(self) -> bool:
        """Whether anything but the memory kind changes."""
        same = self.source.with_memory_kind("device").is_equivalent_to(
            self.destination.with_memory_kind("device"), len(self.shape)
        )
        return not same or self.dtype != self.source_dtype

    @property
    def cell_shape(self) -> tuple[int, ...]:
        """The largest block of which every source shard and every destination shard is a whole number."""
        source, destination = self.source.shard_shape(self.shape), self.destination.shard_shape(self.shape)
        return tuple(gcd(a, b) for a, b in zip(source, destination))


# Compared by identity: the planner's cache gives the same object for the same question, and programs are cached by it.
@dataclass(frozen=True, kw_only=True, eq=False)
class LeafPlan:
    """The moves that fill every destination shard of one array."""

    spec: LeafSpec
    moves: tuple[Move, ...]

    @cached_property
    def moves_to(self) -> dict[jax.Device, tuple[Move, ...]]:
        """The moves that fill each destination device's shard."""
        return {device: tuple(moves) for device, moves in groupby(self.moves, key=lambda m: m.destination)}

    @cached_property
    def bytes_kept(self) -> int:
        """Bytes that a destination device already holds in the right kind of memory."""
        if memory_kind(self.spec.source) != memory_kind(self.spec.destination):
            return 0
        return sum(self._num_bytes(m) for m in self.moves if m.source == m.destination)

    @cached_property
    def bytes_moved(self) -> int:
        """Bytes that cross from device to device or between device and host memory: no method can move fewer."""
        return sum(self._num_bytes(m) for m in self.moves) - self.bytes_kept

    @cached_property
    def is_wrap(self) -> bool:
        """Whether every destination device already holds exactly its shard, so that no byte needs to be written."""
        spec = self.spec
        return (
            spec.dtype == spec.source_dtype
            and self.bytes_moved == 0
            and spec.source.shard_shape(spec.shape) == spec.destination.shard_shape(spec.shape)
        )

    @cached_property
    def stays_in_process(self) -> bool:
        return all(m.source.process_index == m.destination.process_index for m in self.moves)

    def _num_bytes(self, move: Move) -> int:
        return prod(stop - start for start, stop in move.box) * self.spec.wire_dtype.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class ReshardPlan:
    """The moves of a whole tree, leaves in the order of `jax.tree.leaves`."""

    leaves: tuple[LeafPlan, ...]

    @cached_property
    def bytes_moved(self) -> int:
        return sum(leaf.bytes_moved for leaf in self.leaves)

    @cached_property
    def bytes_kept(self) -> int:
        return sum(leaf.bytes_kept for leaf in self.leaves)

    def describe(self) -> str:
        """Returns a table, one line a leaf and one for the total."""
        rows = [("leaf", "shape", "dtype", "from", "to", "moves", "keeps")]
        for leaf in self.leaves:
            spec = leaf.spec
            dtype = spec.dtype.name if spec.dtype == spec.source_dtype else f"{spec.source_dtype}->{spec.dtype}"
            places = describe_sharding(spec.source), describe_sharding(spec.destination)
            sizes = _format_bytes(leaf.bytes_moved), _format_bytes(leaf.bytes_kept)
            rows.append((spec.path, "x".join(map(str, spec.shape)) or "scalar", dtype, *places, *sizes))
        rows.append(("total", "", "", "", "", _format_bytes(self.bytes_moved), _format_bytes(self.bytes_kept)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def plan_reshard(
    abstract_tree: object,
    source_shardings: object,
    destination_shardings: object,
    *,
    dtype: DTypeLike | Tree | None = None,
) -> ReshardPlan:
    """Returns how a tree of arrays (or of `jax.ShapeDtypeStruct`) moves; floating leaves become `dtype` where one is
    given, or each that of a tree of dtypes.

    Raises ValueError when the trees differ or a shape does not divide over its sharding. Cached.
    """
    leaves = _flatten(abstract_tree)
    sources = _same_paths(leaves, _flatten(source_shardings), "source_shardings")
    destinations = _same_paths(leaves, _flatten(destination_shardings), "destination_shardings")
    dtypes = _same_paths(leaves, _flatten(dtype), "dtype") if isinstance(dtype, dict) else dict.fromkeys(leaves, dtype)
    return plan_leaves(
        tuple(
            LeafSpec(
                path=path,
                shape=tuple(leaf.shape),
                source_dtype=np.dtype(leaf.dtype),
                dtype=target_dtype(leaf.dtype, dtypes[path]),
                source=sources[path],
                destination=destinations[path],
            )
            for path, leaf in leaves.items()
        )
    )


@lru_cache(maxsize=128)
def plan_leaves(specs: tuple[LeafSpec, ...]) -> ReshardPlan:
    """Returns the plan of `specs`, with the sending spread over the replicas of the whole tree. Cached."""
    load: dict[jax.Device, int] = defaultdict(int)
    return ReshardPlan(leaves=tuple(LeafPlan(spec=spec, moves=tuple(_moves(spec, load))) for spec in specs))


def _moves(spec: LeafSpec, load: dict[jax.Device, int]) -> Iterator[Move]:
    holders: dict[Box, list[jax.Device]] = defaultdict(list)
    for device, box in _boxes(spec, spec.source).items():
        holders[box].append(device)
    pieces: dict[Box, list[tuple[Box, list[jax.Device]]]] = {}
    for device, box in _boxes(spec, spec.destination).items():
        if box not in pieces:
            cuts = ((_intersect(box, held), devices) for held, devices in holders.items())
            pieces[box] = [(cut, devices) for cut, devices in cuts if cut is not None]
        for cut, devices in pieces[box]:
            source = _nearest(device, devices, load)
            load[source] += 0 if source == device else prod(stop - start for start, stop in cut)
            yield Move(source=source, destination=device, box=cut)


def _nearest(device: jax.Device, holders: list[jax.Device], load: dict[jax.Device, int]) -> jax.Device:
    """Returns the device itself, else the least busy holder of its process, else the least busy one."""
    if device in holders:
        return device
    near = [d for d in holders if d.process_index == device.process_index]
    return min(near or holders, key=lambda d: load[d])


def _boxes(spec: LeafSpec, sharding: Sharding) -> dict[jax.Device, Box]:
    try:
        indices = sharding.devices_indices_map(spec.shape)
    except ValueError as error:
        raise ValueError(
            f"reshard '{spec.path}': shape {spec.shape} does not divide over {describe_sharding(sharding)}; "
            "split another dim or use fewer parts"
        ) from error
    return {
        device: tuple((s.start or 0, size if s.stop is None else s.stop) for s, size in zip(index, spec.shape))
        for device, index in sorted(indices.items(), key=lambda item: item[0].id)
    }


def _intersect(a: Box, b: Box) -> Box | None:
    cut = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b))
    return cut if all(start < stop for start, stop in cut) else None


def cells(box: Box, cell_shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields the starts of the cells of which `box` consists."""
    yield from product(*(range(start, stop, step) for (start, stop), step in zip(box, cell_shape)))


def target_dtype(leaf_dtype: DTypeLike, dtype: DTypeLike | None) -> np.dtype:
    """Returns `dtype` for a floating leaf where one is asked for, the leaf's own otherwise."""
    floating = jnp.issubdtype(leaf_dtype, jnp.floating)
    return np.dtype(dtype if dtype is not None and floating else leaf_dtype)


def memory_kind(sharding: Sharding) -> str:
    """Returns 'device' or 'pinned_host', also where the sharding leaves the kind to the backend."""
    return sharding.memory_kind or "device"


def describe_sharding(sharding: Sharding) -> str:
    """Returns e.g. "(None, 'tensor') of data2 tensor4 on 0,1,2,3,4,5,6,7 pinned_host"."""
    kind = "" if memory_kind(sharding) == "device" else f" {memory_kind(sharding)}"
    if not isinstance(sharding, NamedSharding):
        return f"devices {','.join(str(d.id) for d in sorted(sharding.device_set, key=lambda d: d.id))}{kind}"
    axes = " ".join(f"{axis}{size}" for axis, size in sharding.mesh.shape.items() if size > 1) or "one device"
    ids = ",".join(str(device.id) for device in np.array(sharding.mesh.devices).flat)
    return f"{tuple(sharding.spec)} of {axes} on {ids}{kind}"


def _flatten(tree: object) -> dict[str, Any]:
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}


Leaf = TypeVar("Leaf")


def _same_paths(leaves: dict[str, Any], other: dict[str, Leaf], subject: str) -> dict[str, Leaf]:
    missing, unknown = sorted(leaves.keys() - other.keys()), sorted(other.keys() - leaves.keys())
    if missing or unknown:
        raise ValueError(
            f"reshard: {subject} has {len(other)} leaves, the tree {len(leaves)}; missing: {missing or 'none'}, "
            f"not in the tree: {unknown or 'none'}; give one for every leaf"
        )
    return other


def _format_bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
