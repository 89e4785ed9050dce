"""What a cluster can do: its devices, their memory and rates, and the links between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects two memories: alpha-beta, as in Hockney's model: seconds = latency + bytes / bandwidth."""

    bandwidth: float  # bytes a second, of one device in one direction
    latency: float  # seconds of the smallest message

    def seconds(self, num_bytes: float) -> float:
        """Returns how long a message takes."""
        return self.latency + num_bytes / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices. Rates are the data sheet's peaks; `factors` say which share of them programs reach."""

    name: str
    num_nodes: int
    devices_per_node: int
    memory_bytes: int  # of a device
    matmul_flops: Mapping[str, float]  # dense, by dtype: operations a second
    memory_bandwidth: float  # bytes a second of a device's own memory
    within_node: Link
    between_nodes: Link
    to_host: Link
    host_memory_bytes: int | None = None  # of a node; None: not limited
    dispatch_seconds: float = 0.0  # to start a program
    factors: Mapping[str, float] = field(default_factory=dict)  # by term of the cost model; measured runs refine them

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def factor(self, name: str, default: float = 1.0) -> float:
        """Returns a calibrated factor."""
        return self.factors.get(name, default)
