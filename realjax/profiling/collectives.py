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
from realjax.profiling.machine import fit_link

CALLS_IN_PROGRAM = 4
WIDTH = 256  # of the matrices of products between them
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


def measure_group(clock: Clock, group: Group, mesh: Mesh, sizes: Sequence[int]) -> list[CollectivePoint]:
    """Returns the collectives of a group for these bytes, see `CollectivePoint`; every process must call this.

    They take turns with products, as in a step: what a processor's threads wait for each other, they wait there too.
    The same program without them is taken off.
    """
    cases: list[tuple[Collective, int]] = [(kind, size) for kind in KINDS for size in sizes]
    probes = {(kind, size): _probe(_CALLS[kind], mesh, group.size, _count(kind, group, size)) for kind, size in cases}
    probes |= {(None, size): _probe(lambda x, _: x, mesh, group.size, size // 4) for size in sizes}
    seconds = clock.measure(probes)
    return [
        CollectivePoint(
            kind=kind,
            span=group.span,
            num_devices=group.size,
            num_bytes=size,
            seconds=_less(seconds[kind, size], seconds[None, size]) / CALLS_IN_PROGRAM,
        )
        for kind, size in cases
    ]


def _less(seconds: float, others: float) -> float:
    """Returns what is left without the others; where these are nearly all, noise alone would be."""
    return max(seconds - others, seconds / 10)


def _count(kind: Collective, group: Group, num_bytes: int) -> int:
    """Returns the float32 numbers that a device gives of so many bytes, see `CollectivePoint`."""
    return num_bytes // 4 // (group.size if kind == "all_gather" else 1)


def _probe(talk_fn: Callable[[Array, int], Array], mesh: Mesh, size: int, num_given: int) -> Probe:
    """Returns the probe of a few collectives with a product behind each, all of which wait for what came before."""
    spec = PartitionSpec(("others", GROUP))
    fill = lambda shape: jax.jit(
        lambda: jnp.ones((mesh.devices.size * shape[0], *shape[1:]), jnp.float32),
        out_shardings=NamedSharding(mesh, spec),
    )()
    x, matrix = fill((num_given,)), fill((WIDTH, WIDTH))

    def run(x: Array, matrix: Array) -> list[Array]:
        results = []
        for _ in range(CALLS_IN_PROGRAM):
            x, y, matrix = jax.lax.optimization_barrier((x, talk_fn(x, size), matrix))
            results.append(y[:1])
            matrix, x = jax.lax.optimization_barrier((matrix @ matrix / WIDTH, x))
        return [*results, matrix]

    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return lambda: program(x, matrix)


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
