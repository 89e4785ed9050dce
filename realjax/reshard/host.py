"""Copies pieces between devices whose memory the process can address: the CPU backend's, pinned host memory included.

Source shards are read and destination shards written in place, so that nothing but the destination is allocated and
nothing is compiled. Replicas of a shard within the process share one buffer, as they do after `jax.device_put`.
"""

from math import prod

import jax
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from realjax.reshard.plan import Box, LeafPlan, memory_kind

# XLA adopts a numpy buffer as its own when it starts on such a boundary, and copies it otherwise.
XLA_ALIGNMENT = 64


def copy_on_host(leaf: LeafPlan, array: Array) -> Array:
    """Returns `array` in its destination, every shard filled by plain memory copies; casts on the way."""
    spec = leaf.spec
    held = {s.device: (_start(s.index), np.asarray(s.data)) for s in array.addressable_shards}
    shape, kind = spec.destination.shard_shape(spec.shape), memory_kind(spec.destination)
    filled: dict[tuple[int, ...], np.ndarray] = {}
    buffers = []
    indices = spec.destination.devices_indices_map(spec.shape)
    for device in spec.destination.addressable_devices:
        zero = _start(indices[device])
        if zero not in filled:
            filled[zero] = _empty(shape, spec.dtype)
            for move in leaf.moves_to[device]:
                origin, source = held[move.source]
                filled[zero][_within(move.box, zero)] = source[_within(move.box, origin)]
        buffers.append(jax.device_put(filled[zero], SingleDeviceSharding(device, memory_kind=kind)))
    return jax.make_array_from_single_device_arrays(spec.shape, spec.destination, buffers, dtype=spec.dtype)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + XLA_ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % XLA_ALIGNMENT
    return raw[offset : offset + num_bytes].view(dtype).reshape(shape)


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(s.start or 0 for s in index)


def _within(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start - zero, stop - zero) for (start, stop), zero in zip(box, origin))
