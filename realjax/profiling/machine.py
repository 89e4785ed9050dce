"""What one device does by itself: matrix products, its memory, the way to the host, starting a program."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from realjax.allocation.cluster import Link
from realjax.allocation.measured import ProductPoint
from realjax.profiling.clock import Clock, Probe

PRODUCTS_IN_PROGRAM = 4  # so that starting it is a small part
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product [rows, inner] x [inner, columns]."""

    dtype: str
    rows: int
    inner: int
    columns: int


class Busy:
    """Programs that run on several devices of this process at once, on each for itself.

    Virtual devices share the processor's cores, and what one of them does alone says nothing of a step that uses all.
    """

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.mesh = Mesh(np.array(devices, dtype=object), ("each",), axis_types=(AxisType.Auto,))
        self.sharding = NamedSharding(self.mesh, PartitionSpec("each"))

    def fill(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Returns an array of this shape on each device, one behind the other."""
        whole = (len(self.mesh.devices) * shape[0], *shape[1:])
        make = lambda: jnp.full(whole, 0.5, dtype)
        return jax.jit(make, out_shardings=self.sharding)()

    def probe(self, fn: Callable[..., Any], *arrays: Array) -> Probe:
        """Returns the probe of `fn` on each device's own part of the arrays."""
        spec = PartitionSpec("each")
        run = jax.jit(jax.shard_map(fn, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False))
        return lambda: run(*arrays)


def measure_dispatch(clock: Clock, busy: Busy) -> float:
    """Returns the seconds of a program on all of the process's devices that has nothing to do."""
    return clock.measure({"dispatch": busy.probe(lambda x: x + 1, busy.fill((1,), "float32"))})["dispatch"]


def measure_products(
    clock: Clock, busy: Busy, products: Sequence[Product], dispatch_seconds: float
) -> list[ProductPoint]:
    """Returns how long matrix products take on one device while the others do the same."""
    seconds = clock.measure({product: probe_product(busy, product) for product in products})
    return [
        ProductPoint(**vars(product), seconds=without_dispatch(took, dispatch_seconds) / PRODUCTS_IN_PROGRAM)
        for product, took in seconds.items()
    ]


def probe_product(busy: Busy, product: Product) -> Probe:
    """Returns the probe of a few products with matrices of their own, as those of layers are, one after the other."""

    def run(x: Array, *matrices: Array) -> list[Array]:
        results = []
        for matrix in matrices:
            y = x @ matrix
            x, y = jax.lax.optimization_barrier((x, y))
            results.append(y)
        return results

    x = busy.fill((product.rows, product.inner), product.dtype)
    matrices = [busy.fill((product.inner, product.columns), product.dtype) for _ in range(PRODUCTS_IN_PROGRAM)]
    return busy.probe(run, x, *matrices)


def without_dispatch(seconds: float, dispatch_seconds: float) -> float:
    """Returns a program's seconds without those of its start, which can be no more than half of it."""
    return max(seconds - dispatch_seconds, seconds / 2)


def measure_memory(clock: Clock, busy: Busy, num_bytes: int) -> float:
    """Returns the bytes a second that a device reads and writes of its own memory, while the others do the same."""
    x = busy.fill((num_bytes // 4,), "float32")
    return 2 * num_bytes / clock.measure({"memory": busy.probe(lambda x: x + 1, x)})["memory"]


def measure_sharing(clock: Clock, devices: Sequence[jax.Device], sizes: Sequence[int], product: Product) -> list[float]:
    """Returns for numbers of busy devices how much slower each is when all of them are."""
    probes = {n: probe_product(Busy(devices[:n]), product) for n in {*sizes, len(devices)}}
    seconds = clock.measure(probes)
    return [seconds[len(devices)] / seconds[n] for n in sizes]


def measure_host_link(clock: Clock, device: jax.Device, sizes: Sequence[int]) -> Link:
    """Returns how a device's memory and its host's pinned memory are connected, as the mean of both ways."""
    on_device, on_host = (jax.sharding.SingleDeviceSharding(device, memory_kind=k) for k in ("device", "pinned_host"))
    probes: dict[tuple[str, int], Probe] = {}
    for size in sizes:
        here = jax.device_put(np.ones(size // 4, np.float32), on_device)
        there = jax.device_put(here, on_host)
        probes["out", size] = lambda here=here: jax.device_put(here, on_host)
        probes["in", size] = lambda there=there: jax.device_put(there, on_device)
    seconds = clock.measure(probes)
    return fit_link({size: (seconds["out", size] + seconds["in", size]) / 2 for size in sizes})


def fit_link(seconds: dict[int, float]) -> Link:
    """Returns the alpha-beta line through the smallest and the largest message, by their bytes."""
    least, most = min(seconds), max(seconds)
    slope = (seconds[most] - seconds[least]) / (most - least)
    if slope <= 0:  # both are mere latency, or noise: the largest then says how much there is at least
        return Link(bandwidth=most / seconds[most], latency=0.0)
    return Link(bandwidth=1 / slope, latency=max(0.0, seconds[least] - least * slope))


def read_memory_bytes(devices: Sequence[jax.Device], processes_per_node: int) -> int:
    """Returns the memory of a device; virtual devices share their machine's."""
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return read_host_bytes() // (len(devices) * processes_per_node)


def read_host_bytes() -> int:
    """Returns the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
