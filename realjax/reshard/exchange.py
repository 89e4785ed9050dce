"""Moves pieces between devices by collective permutes: any backend, any number of processes, any two device sets.

Three programs a bundle of leaves. `pack` runs on the source devices and cuts out the pieces to send; `permute` runs on
the union of the devices and moves every piece straight to its reader, in rounds in which a device sends at most one and
receives at most one; `place` runs on the destination devices and writes the pieces into the new shards. Shards enter
and leave as slices of a flat array, `[num_devices * shard_dim_0, ...]` over one mesh axis, so no mesh has to factor
into another. The tables of starts are constants of the programs, looked up by device: one compile serves all devices.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from realjax.reshard.plan import LeafPlan, cells

AXIS = "device"
Starts = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """Pieces that travel together: (sender, receiver) pairs, where each sender reads and each receiver writes."""

    pairs: tuple[tuple[jax.Device, jax.Device], ...]
    reads: dict[jax.Device, Starts]
    writes: dict[jax.Device, Starts]


# Compared by identity, as the plan of its leaf is: programs are cached by it.
@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The rounds of one leaf. A piece of `piece_shape` is cut along `slab_dim` into `num_slabs` of `slab_shape`."""

    leaf: LeafPlan
    rounds: tuple[Round, ...]
    piece_shape: tuple[int, ...]
    slab_shape: tuple[int, ...]
    slab_dim: int
    num_slabs: int

    @property
    def slab_bytes(self) -> int:
        """Bytes staged on one device for one slab: all rounds, once to send and once received."""
        return 2 * len(self.rounds) * prod(self.slab_shape) * self.leaf.spec.wire_dtype.itemsize


@lru_cache(maxsize=1024)
def make_schedule(leaf: LeafPlan, chunk_bytes: int) -> Schedule:
    """Returns the rounds of `leaf`, cut so that a slab, unless it is one element thin, stages at most `chunk_bytes`."""
    shape = leaf.spec.cell_shape
    rounds = _rounds(leaf)
    staged = 2 * len(rounds) * prod(shape) * leaf.spec.wire_dtype.itemsize
    # The outermost dim that allows enough cuts keeps the slabs contiguous.
    cuts = ceil(staged / chunk_bytes)
    dim = next((d for d, size in enumerate(shape) if size >= cuts), int(np.argmax(shape or (1,))))
    length = shape[dim] if shape else 1
    slab = min(length, max(1, length * chunk_bytes // staged))

    slab_shape = tuple(slab if d == dim else size for d, size in enumerate(shape))
    return Schedule(
        leaf=leaf,
        rounds=rounds,
        piece_shape=shape,
        slab_shape=slab_shape,
        slab_dim=dim,
        num_slabs=ceil(length / slab),
    )


def _rounds(leaf: LeafPlan) -> tuple[Round, ...]:
    """Returns a greedy colouring of the moves; taken by their shift over the devices, most form whole rotations."""
    spec = leaf.spec
    order = {d: i for i, d in enumerate(_union(leaf))}
    source = spec.source.devices_indices_map(spec.shape)
    destination = spec.destination.devices_indices_map(spec.shape)
    edges = [
        (m.source, m.destination, _local(start, source[m.source]), _local(start, destination[m.destination]))
        for m in leaf.moves
        for start in cells(m.box, spec.cell_shape)
    ]
    edges.sort(key=lambda e: (order[e[1]] - order[e[0]]) % len(order))
    rounds: list[tuple[dict, dict, list]] = []
    for sender, receiver, read, write in edges:
        free = next((r for r in rounds if sender not in r[0] and receiver not in r[1]), None)
        if free is None:
            free = ({}, {}, [])
            rounds.append(free)
        reads, writes, pairs = free
        reads[sender], writes[receiver] = read, write
        pairs.append((sender, receiver))
    return tuple(Round(pairs=tuple(pairs), reads=reads, writes=writes) for reads, writes, pairs in rounds)


def _local(start: Starts, index: tuple[slice, ...]) -> Starts:
    return tuple(a - (s.start or 0) for a, s in zip(start, index))


def exchange(schedules: tuple[Schedule, ...], arrays: list[Array], release: Callable[[], None]) -> list[Array]:
    """Returns the arrays in the device memory of their destinations; calls `release` once all pieces are read.

    Empties the list `arrays`, so that nothing here keeps them. The schedules share both device sets; one that takes
    several slabs comes alone. Every process must make the same call, also one without a device in it.
    """
    programs = _make_programs(schedules)
    specs = [s.leaf.spec for s in schedules]
    slab_shapes, num_slabs = [s.slab_shape for s in schedules for _ in s.rounds], schedules[0].num_slabs
    shards = [_rewrap(programs.sources, spec.source.shard_shape(spec.shape), a) for spec, a in zip(specs, arrays)]
    arrays.clear()
    blanks = programs.blanks() if programs.blanks else [None] * len(slab_shapes)
    filled = programs.zeros() if num_slabs > 1 else []
    for slab in range(num_slabs):
        sent = programs.pack(shards, slab)
        if slab == num_slabs - 1:
            del shards
            release()
        sent = [_rewrap(programs.union, shape, *pair) for shape, *pair in zip(slab_shapes, sent, blanks)]
        received = [_rewrap(programs.destinations, shape, a) for shape, a in zip(slab_shapes, programs.permute(sent))]
        del sent
        filled = programs.place(filled, received, slab)
        del received
        if num_slabs > 1:
            # Dispatched all at once, the slabs would be in memory all at once.
            jax.block_until_ready(filled)
    return [
        jax.make_array_from_single_device_arrays(
            spec.shape,
            spec.destination.with_memory_kind("device"),
            [s.data for s in array.addressable_shards],
            dtype=spec.dtype,
        )
        for spec, array in zip(specs, filled)
    ]


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled steps of one bundle and the flat meshes on which they run."""

    sources: Mesh
    union: Mesh
    destinations: Mesh
    pack: Callable
    permute: Callable
    place: Callable
    zeros: Callable[[], list[Array]]
    blanks: Callable[[], list[Array]] | None


@lru_cache(maxsize=512)
def _make_programs(schedules: tuple[Schedule, ...]) -> Programs:
    specs = [s.leaf.spec for s in schedules]
    union = _union(schedules[0].leaf)
    bystanders = [d for d in union if d not in specs[0].source.device_set]
    sources, destinations = _flat_mesh(specs[0].source.device_set), _flat_mesh(specs[0].destination.device_set)
    slabs = [jax.ShapeDtypeStruct(s.slab_shape, _bits(s.leaf.spec.wire_dtype)) for s in schedules for _ in s.rounds]
    shards = [jax.ShapeDtypeStruct(spec.destination.shard_shape(spec.shape), spec.dtype) for spec in specs]
    return Programs(
        sources=sources,
        union=_flat_mesh(union),
        destinations=destinations,
        pack=_make_pack(schedules, sources),
        permute=_make_permute(schedules, _flat_mesh(union)),
        place=_make_place(schedules, destinations),
        zeros=_make_zeros(shards, destinations),
        blanks=_make_zeros(slabs, _flat_mesh(bystanders)) if bystanders else None,
    )


def _make_pack(schedules: tuple[Schedule, ...], mesh: Mesh) -> Callable:
    # A device that sends nothing in a round reads its first piece: nobody receives it.
    tables = [
        [_table([r.reads.get(d, (0,) * len(s.piece_shape)) for d in mesh.devices.flat]) for r in s.rounds]
        for s in schedules
    ]

    def pack(shards: list[Array], slab: Array) -> list[Array]:
        pieces = []
        for schedule, shard, reads in zip(schedules, shards, tables):
            for table in reads:
                carried = _recast(shard, _carrier(shard.dtype, mesh))
                piece = _recast(_read(carried, _slab_start(schedule, table, slab), schedule.slab_shape), shard.dtype)
                wire_dtype = schedule.leaf.spec.wire_dtype
                pieces.append(_recast(piece.astype(wire_dtype), _bits(wire_dtype)))
        return pieces

    ranks = [len(s.slab_shape) for s in schedules]
    return _per_device(pack, mesh, (_flat_specs(ranks), PartitionSpec()), _piece_specs(schedules))


def _make_permute(schedules: tuple[Schedule, ...], mesh: Mesh) -> Callable:
    order = {d: i for i, d in enumerate(mesh.devices.flat)}
    perms = [[(order[a], order[b]) for a, b in r.pairs] for s in schedules for r in s.rounds]

    def permute(pieces: list[Array]) -> list[Array]:
        return [lax.ppermute(piece, AXIS, perm) for piece, perm in zip(pieces, perms)]

    return _per_device(permute, mesh, (_piece_specs(schedules),), _piece_specs(schedules))


def _make_place(schedules: tuple[Schedule, ...], mesh: Mesh) -> Callable:
    arrivals = [_arrivals(s, mesh) for s in schedules]

    def place(filled: list[Array], pieces: list[Array], slab: Array) -> list[Array]:
        remaining, results = iter(pieces), []
        for i, schedule in enumerate(schedules):
            spec = schedule.leaf.spec
            received = [next(remaining) for _ in schedule.rounds]
            shape = spec.destination.shard_shape(spec.shape)
            carrier = _carrier(spec.dtype, mesh)
            shard = _recast(filled[i] if filled else jnp.zeros(shape, spec.dtype), carrier)
            for turns, table in arrivals[i]:
                piece = _recast(_choose(received, turns), spec.wire_dtype).astype(spec.dtype)
                start = _slab_start(schedule, table, slab)
                piece = _recast(piece, carrier)
                shard = lax.dynamic_update_slice(shard, piece, start) if start else piece
            results.append(_recast(shard, spec.dtype))
        return results

    specs = _flat_specs([len(s.slab_shape) for s in schedules])
    in_specs = (specs if schedules[0].num_slabs > 1 else [], _piece_specs(schedules), PartitionSpec())
    return _per_device(place, mesh, in_specs, specs, donate_argnums=0)


def _arrivals(schedule: Schedule, mesh: Mesh) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns, for the first, second, ... piece of a device, its round `[num_devices]` and its start in the shard.

    All shards consist of equally many pieces. Counted by device and not by round, no write is conditional, and XLA
    can make all of them in place.
    """
    by_device = [[r for r, turn in enumerate(schedule.rounds) if d in turn.writes] for d in mesh.devices.flat]
    turns = np.array(by_device, np.int32).T
    return [(t, _table([schedule.rounds[r].writes[d] for r, d in zip(t, mesh.devices.flat)])) for t in turns]


def _choose(received: list[Array], turns: np.ndarray) -> Array:
    """Returns the piece that came to this device in its round of `turns`."""
    rounds, choice = np.unique(turns, return_inverse=True)
    if len(rounds) == 1:
        return received[rounds[0]]
    return lax.select_n(jnp.asarray(choice, jnp.int32)[lax.axis_index(AXIS)], *(received[r] for r in rounds))


def _make_zeros(blocks: list[jax.ShapeDtypeStruct], mesh: Mesh) -> Callable:
    specs = _flat_specs([len(b.shape) for b in blocks])
    return _per_device(lambda: [jnp.zeros(b.shape, b.dtype) for b in blocks], mesh, (), specs)


def _per_device(fn: Callable, mesh: Mesh, in_specs: tuple, out_specs: list, **options) -> Callable:
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False), **options)


def _table(starts: list[Starts]) -> np.ndarray:
    """Returns `[num_devices, num_dims]` starts."""
    return np.array(starts, np.int32).reshape(len(starts), -1)


def _slab_start(schedule: Schedule, table: np.ndarray, slab: Array) -> list[Array]:
    starts = list(jnp.asarray(table)[lax.axis_index(AXIS)]) if schedule.slab_shape else []
    if schedule.num_slabs > 1:
        # The last slab starts early enough to be whole: what it overlaps is written twice with the same bits.
        dim, length = schedule.slab_dim, schedule.slab_shape[schedule.slab_dim]
        starts[dim] += jnp.minimum(slab * length, schedule.piece_shape[dim] - length)
    return starts


def _read(shard: Array, start: list[Array], shape: tuple[int, ...]) -> Array:
    return lax.dynamic_slice(shard, start, shape) if start else shard


def _recast(array: Array, dtype: np.dtype) -> Array:
    """Returns the same bits as another type of the same width."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


def _bits(dtype: np.dtype) -> np.dtype:
    """Returns the unsigned integer in which a float travels: no backend takes it for a number and changes a NaN."""
    return np.dtype(f"uint{8 * dtype.itemsize}") if jnp.issubdtype(dtype, jnp.floating) else dtype


def _carrier(dtype: np.dtype, mesh: Mesh) -> np.dtype:
    """Returns the type in which a shard is read and written: its own, as another type needs a second copy of it.

    Except on CPUs, whose backend widens a narrow float to take or update a slice, and narrows it, which changes NaNs.
    """
    return _bits(dtype) if mesh.devices.flat[0].platform == "cpu" and dtype.itemsize < 4 else dtype


def _rewrap(mesh: Mesh, shard_shape: tuple[int, ...], *arrays: Array | None) -> Array:
    """Returns the array of `mesh` whose shards are those shards of `arrays` that lie on it. Copies nothing."""
    present = [a for a in arrays if a is not None]
    members = set(mesh.devices.flat)
    shards = [s.data for a in present for s in a.addressable_shards if s.device in members]
    shape = (mesh.size * shard_shape[0], *shard_shape[1:]) if shard_shape else ()
    sharding = NamedSharding(mesh, _flat_spec(len(shape)))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=present[0].dtype)


def _flat_mesh(devices: Iterable[jax.Device]) -> Mesh:
    ordered = sorted(devices, key=lambda d: d.id)
    return Mesh(np.array(ordered, dtype=object), (AXIS,), axis_types=(AxisType.Auto,))


def _flat_spec(rank: int) -> PartitionSpec:
    return PartitionSpec(AXIS) if rank else PartitionSpec()


def _flat_specs(ranks: list[int]) -> list[PartitionSpec]:
    return [_flat_spec(rank) for rank in ranks]


def _piece_specs(schedules: tuple[Schedule, ...]) -> list[PartitionSpec]:
    return [_flat_spec(len(s.slab_shape)) for s in schedules for _ in s.rounds]


def _union(leaf: LeafPlan) -> list[jax.Device]:
    return sorted(leaf.spec.source.device_set | leaf.spec.destination.device_set, key=lambda d: d.id)
