"""The cluster that a run is on: as its options say, else as the kind of its devices is known."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from realjax.allocation.cluster import Cluster, find_cluster
from realjax.core.processes import count_cores
from realjax.dataflow.run import AllocationOptions

# What a device is called, and the cluster whose data sheet it has.
KINDS = {
    re.compile(r"\bA100\b"): "a100",
    re.compile(r"\bH100\b"): "h100",
    re.compile(r"\bH200\b"): "h200",
    re.compile(r"\bB200\b"): "b200",
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The cluster of a run, with its nodes and devices, and where its figures are from."""

    cluster: Cluster
    source: str


def find_machine(options: AllocationOptions, devices: Sequence[jax.Device]) -> Machine | None:
    """Returns what the planner knows of the run's machine; None for devices of an unknown kind without a description.

    Raises ValueError for a description that is not there, or cannot be read.
    """
    # In one process, programs of CPU devices run one after the other, also on devices of their own.
    platform = devices[0].platform
    own = {"num_nodes": options.n_nodes, "devices_per_node": options.n_gpus_per_node, "platform": platform}
    own |= {"overlaps": platform != "cpu" or jax.process_count() > 1}
    if (name := options.planner.cluster) is None and options.planner.update_cluster:
        raise ValueError("planner.update_cluster: there is no file to write to; set planner.cluster to a cluster.json")
    if name is not None:
        if options.planner.update_cluster and not name.endswith(".json"):
            raise ValueError(
                f"planner.update_cluster: found planner.cluster={name}, which is no file of yours; set it to a "
                "cluster.json, such as realjax profile writes"
            )
        return Machine(cluster=replace(find_cluster(name), **own), source=name)
    device = devices[0]
    if device.platform == "cpu":
        default = replace(find_cluster("cpu"), **own)
        return Machine(cluster=share_cores(default, devices), source="the default of a CPU, which may be another's")
    known = (name for pattern, name in KINDS.items() if pattern.search(device.device_kind))
    if (name := next(known, None)) is None:
        return None
    return Machine(cluster=replace(find_cluster(name), **own), source=f"the data sheet of {name}")


def need_cluster(options: AllocationOptions, devices: Sequence[jax.Device]) -> Cluster:
    """Returns the cluster that a search plans for. Raises ValueError where nothing is known of the devices."""
    if (machine := find_machine(options, devices)) is None:
        raise ValueError(
            f"allocation_mode: search, but nothing is known of '{devices[0].device_kind}'; set planner.cluster to the "
            "cluster.json that `realjax profile` writes, or to a name such as h100 that is near"
        )
    return machine.cluster


def share_cores(cluster: Cluster, devices: Sequence[jax.Device]) -> Cluster:
    """Returns the default of a CPU, whose figures are a core's, for virtual devices that share this process's cores."""
    num_local = sum(device.process_index == jax.process_index() for device in devices)
    share = min(1.0, count_cores() / max(1, num_local))
    return replace(
        cluster,
        matmul_flops={dtype: rate * share for dtype, rate in cluster.matmul_flops.items()},
        memory_bandwidth=cluster.memory_bandwidth * share,
    )
