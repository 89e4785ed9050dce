"""How long collectives take, by group and bytes, inside a node and between nodes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from realjax.allocation.cluster import Link
from realjax.allocation.measured import Collective, CollectivePoint, Span
from realjax.profiling.clock import Clock, Probe
from realjax.profiling.machine import fit_link, without_dispatch

CALLS_IN_PROGRAM = 4
GROUP = "group"
KINDS: tuple[Collective, ...] = get_args(Collective)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Devices that talk: so many of each, all groups at once. Those of one between nodes are one from each node."""

    span: Span
    size: int

    def make_mesh(self, devices: Sequence[jax.Device], devices_per_node: int) -> Mesh:
        """Returns the mesh whose axis `group` is this."""
        by_node = np.array(devices, dtype=object).reshape(-1, devices_per_node)
        grid = by_node if self.span == "within_node" else by_node.T
        return Mesh(grid.reshape(-1, self.size), ("others", GROUP), axis_types=(AxisType.Auto,) * 2)


def list_groups(num_nodes: int, devices_per_node: int) -> Iterator[Group]:
    """Yields the groups whose sizes double, as strategies have them, up to a whole node and to one device a node."""
    spans: tuple[tuple[Span, int], ...] = (("within_node", devices_per_node), ("between_nodes", num_nodes))
    for span, most in spans:
        size = 2
        while size <= most and most % size == 0:
            yield Group(span=span, size=size)
            size *= 2


def measure_group(
    clock: Clock, group: Group, mesh: Mesh, sizes: Sequence[int], dispatch_seconds: float
) -> list[CollectivePoint]:
    """Returns the collectives of a group for these bytes, see `CollectivePoint`; every process must call this."""
    cases: list[tuple[Collective, int]] = [(kind, size) for kind in KINDS for size in sizes]
    seconds = clock.measure({(kind, size): _probe(kind, mesh, group.size, size) for kind, size in cases})
    return [
        CollectivePoint(
            kind=kind,
            span=group.span,
            num_devices=group.size,
            num_bytes=size,
            seconds=without_dispatch(seconds[kind, size], dispatch_seconds) / CALLS_IN_PROGRAM,
        )
        for kind, size in cases
    ]


def _probe(kind: Collective, mesh: Mesh, size: int, num_bytes: int) -> Probe:
    """Returns the probe of a few collectives, each of which waits for the one before."""
    num_given = num_bytes // 4 // (size if kind == "all_gather" else 1)
    spec = PartitionSpec(("others", GROUP))
    x = jax.jit(lambda: jnp.ones(mesh.devices.size * num_given, jnp.float32), out_shardings=NamedSharding(mesh, spec))()
    talk = _CALLS[kind]

    def run(x: Array) -> list[Array]:
        results = []
        for _ in range(CALLS_IN_PROGRAM):
            y = talk(x, size)
            x, y = jax.lax.optimization_barrier((x, y))
            results.append(y[:1])
        return results

    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return lambda: program(x)


def _permute(x: Array, size: int) -> Array:
    return jax.lax.ppermute(x, GROUP, [(i, (i + 1) % size) for i in range(size)])


_CALLS: dict[Collective, Callable[[Array, int], Array]] = {
    "all_reduce": lambda x, size: jax.lax.psum(x, GROUP),
    "all_gather": lambda x, size: jax.lax.all_gather(x, GROUP, tiled=True),
    "reduce_scatter": lambda x, size: jax.lax.psum_scatter(x, GROUP, tiled=True),
    "all_to_all": lambda x, size: jax.lax.all_to_all(x, GROUP, 0, 0, tiled=True),
    "permute": _permute,
}


def find_link(points: Sequence[CollectivePoint], span: Span) -> Link | None:
    """Returns what connects two neighbours, from what one sends to the next; None where nothing crossed the span."""
    own = [point for point in points if point.kind == "permute" and point.span == span]
    smallest = [point for point in own if point.num_devices == min(each.num_devices for each in own)]
    return fit_link({point.num_bytes: point.seconds for point in smallest}) if smallest else None
