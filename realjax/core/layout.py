"""Where a function call runs: its parallel strategy and its devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Outermost first. The tensor axis varies fastest, so that its neighbours share the fastest links.
MESH_AXES = ("pipe", "data", "expert", "tensor")


@dataclass(frozen=True, kw_only=True)
class ParallelStrategy:
    """How one call is split: data (dp), pipeline (pp), tensor (tp) and expert (ep) parallel sizes.

    Of the dp groups of devices with rows of their own, each `ep` share the experts of a layer: the mesh axes `data` and
    `expert` have dp/ep and ep of them. To rows, and to all parameters but experts, the two are one axis.
    `sequence_parallel` shards norm and residual activations along the sequence over the tensor axis. `zero_stage` 0
    replicates everything over the data axis, 1 and 2 shard the optimizer state over it, 3 the parameters too (ZeRO,
    arXiv:1910.02054). Up to stage 2 each device sums its rows' gradients, float32 and whole, and they cross the data
    axis once a step; in stage 3 every micro-batch's do, into shards.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "pp", "tp", "ep"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"parallel strategy: {name}={size}; every parallel size must be at least 1")
        if self.dp % self.ep:
            raise ValueError(
                f"parallel strategy: ep={self.ep} does not divide dp={self.dp}; devices that share experts are among "
                "those with rows of their own: make the expert parallel size a divisor of the data parallel size"
            )
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"parallel strategy: zero_stage={self.zero_stage}; it must be 0, 1, 2 or 3")

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.dp * self.pp * self.tp

    @property
    def row_multiple(self) -> int:
        """What a number of rows must be a multiple of: every device with rows gets some for each pipeline stage."""
        return self.dp * self.pp

    def __str__(self) -> str:
        flags = ("+sp" if self.sequence_parallel else "") + (f"+zero{self.zero_stage}" if self.zero_stage else "")
        experts = f"e{self.ep}" if self.ep > 1 else ""
        return f"d{self.dp}{experts}p{self.pp}m{self.tp}{flags}"


@dataclass(frozen=True)
class Layout:
    """A strategy on an explicit list of devices. Two equal layouts hold every array in the same place.

    Raises ValueError when the number of devices is not the strategy's, or a device is listed twice.
    """

    strategy: ParallelStrategy
    devices: tuple[jax.Device, ...]

    def __post_init__(self) -> None:
        if len(self.devices) != self.strategy.size:
            raise ValueError(
                f"layout {self.strategy}: needs dp*pp*tp = {self.strategy.size} devices, got {len(self.devices)}; "
                "change the parallel sizes or the device list"
            )
        if len(set(self.devices)) != len(self.devices):
            raise ValueError(f"layout {self.strategy}: a device is listed twice in {[d.id for d in self.devices]}")

    @classmethod
    def of(cls, strategy: ParallelStrategy, devices: Sequence[jax.Device] | None = None) -> "Layout":
        """Returns the layout on `devices`, or on the first `strategy.size` devices of the backend."""
        chosen = tuple(devices) if devices is not None else tuple(jax.devices()[: strategy.size])
        return cls(strategy, chosen)

    @cached_property
    def mesh(self) -> Mesh:
        """The device mesh, axes (pipe, data, expert, tensor), all of type Auto."""
        s = self.strategy
        grid = np.array(self.devices, dtype=object).reshape(s.pp, s.dp // s.ep, s.ep, s.tp)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def sharding(self, *spec: str | tuple[str, ...] | None) -> NamedSharding:
        """Returns the sharding of an array whose dims lie over the mesh axes `spec`."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    @property
    def replicated(self) -> NamedSharding:
        return self.sharding()

    def share_layers(self, tp: int) -> "Layout":
        """Returns the layout on these devices in which `tp` of them share each layer, a multiple of as many as now.

        Each device's new part of the parameters is inside the one that it has: those beside each other along `data` cut
        theirs into as many parts. Raises ValueError for pipeline stages, experts that are shared, or sizes that do not
        divide.
        """
        s = self.strategy
        factor = tp // s.tp
        if s.pp > 1 or s.ep > 1 or tp % s.tp or factor < 1 or s.dp % factor:
            raise ValueError(
                f"layout {s}: {tp} devices cannot share each layer of what it holds; on one pipeline stage, without "
                f"expert parallelism, it can be {s.tp} times a divisor of dp={s.dp}"
            )
        grid = np.array(self.devices, dtype=object).reshape(s.dp // factor, factor, s.tp)
        return Layout(ParallelStrategy(dp=s.dp // factor, tp=tp), tuple(grid.swapaxes(1, 2).flat))

    @property
    def device_names(self) -> str:
        """The devices' numbers, as '0-3,6'."""
        return name_devices(self.devices)

    def __str__(self) -> str:
        return f"{self.strategy} on {self.device_names}"


def name_devices(devices: Sequence[jax.Device]) -> str:
    """Returns the devices' numbers among those of all processes, as '0-3,6'."""
    ids = [device.id for device in devices]
    if any(device.platform == "cpu" for device in devices):  # whose ids have gaps between processes
        places = {i: place for place, i in enumerate(sorted(device.id for device in jax.devices("cpu")))}
        ids = [places[i] for i in ids]
    return number_ranges(ids)


def number_ranges(ids: Sequence[int]) -> str:
    """Returns '0-3,6' for [0, 1, 2, 3, 6]."""
    parts: list[list[int]] = []
    for i in ids:
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
