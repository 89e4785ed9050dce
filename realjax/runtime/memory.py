"""Device memory of calls: counted from shapes and shardings, so that nothing is read and nothing waits for a result."""

from collections.abc import Iterable
from math import prod

import jax
from jax import Array

from realjax.reshard.plan import memory_kind


def bytes_held_beside(given: object, states: object, devices: Iterable[jax.Device]) -> int:
    """Returns the most bytes that one of the devices holds of the states' arrays but for those that `given` has.

    What waits in host memory does not count. A copy counts in full, also one that shares shards with its source.
    """
    own = {id(leaf) for leaf in jax.tree.leaves(given)}
    others = [leaf for leaf in jax.tree.leaves(states) if id(leaf) not in own]
    return max(device_bytes(others, device) for device in devices)


def device_bytes(arrays: Iterable[Array], device: jax.Device) -> int:
    """Returns the bytes of the arrays' shards in the memory of a device, of this process or another."""
    return sum(
        prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in arrays
        if memory_kind(array.sharding) == "device" and device in array.sharding.device_set
    )


def measured_peak_bytes(devices: Iterable[jax.Device]) -> int | None:
    """Returns the most bytes in use on one of the devices since the process began, None where they do not count."""
    stats = [device.memory_stats() for device in devices]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    return max(peaks, default=None)
