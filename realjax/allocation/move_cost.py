"""Seconds of parameters on their way: from one call's layout to another's, and from host memory."""

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.rates import BYTES
from realjax.allocation.workload import RoleWork
from realjax.core.layout import ParallelStrategy


def move_terms(role: RoleWork, source: Choice, destination: Choice, cluster: Cluster) -> dict[str, float]:
    """Returns a cast to the compute dtype where parameters are float32 masters, then the busiest device's traffic over
    each kind of link, as `reshard/plan.py` moves: what a device holds stays, the rest comes from its own node first."""
    width, kept_as = BYTES[role.dtype], 4 if role.is_trained or role.is_averaged else BYTES[role.dtype]
    size = role.model.num_params
    terms = {}
    if kept_as > width:
        parts = source.strategy.pp * source.strategy.tp * _shards(source.strategy)
        terms["cast"] = (kept_as + width) * size / parts / cluster.memory_bandwidth
    within, between, has_moved = _traffic(
        source.devices, source.strategy, destination.devices, destination.strategy, cluster.devices_per_node
    )
    if not has_moved:
        return terms
    share = cluster.factor("links")
    if within:
        link = cluster.within_node
        terms["within_node"] = link.latency + within * size * width / (share * link.bandwidth)
    if between:
        link = cluster.between_nodes
        terms["between_nodes"] = link.latency + between * size * width / (share * link.bandwidth)
    return terms | {"dispatch": 3 * cluster.dispatch_seconds}


def fetch_terms(role: RoleWork, destination: Choice, cluster: Cluster) -> dict[str, float]:
    """Returns each device's part of the parameters over its link to the host, all devices at once."""
    s = destination.strategy
    part = role.model.num_params * BYTES[role.dtype] / (s.pp * s.tp * _shards(s))
    share = cluster.factor("links")
    link = cluster.to_host
    return {"host": link.latency + part / (share * link.bandwidth), "dispatch": cluster.dispatch_seconds}


def _shards(strategy: ParallelStrategy) -> int:
    return strategy.dp if strategy.zero_stage == 3 else 1


@lru_cache(maxsize=65536)
def _traffic(
    devices: tuple[int, ...], strategy: ParallelStrategy, to: tuple[int, ...], other: ParallelStrategy, per_node: int
) -> tuple[float, float, bool]:
    """Returns the most that a device sends or receives within its node and between nodes, as shares of the parameters,
    and whether any moves.

    Parameters are a box of layers x widths x shards, cut by both layouts: pipe cuts layers, tensor widths, and ZeRO's
    third stage a dim of its own. Of the replicas of a piece, a device's own comes first, then one of its node, then the
    one that sends least.
    """
    if devices == to and strategy == other:
        return 0.0, 0.0, False
    holders = defaultdict(list)
    for device, box in _boxes(devices, strategy):
        holders[box].append(device)
    received, sent = (defaultdict(float), defaultdict(float)), (defaultdict(float), defaultdict(float))
    for device, box in _boxes(to, other):
        for cut, owners in ((_overlap(box, held), owners) for held, owners in holders.items()):
            if cut == 0 or device in owners:
                continue
            near = [owner for owner in owners if owner // per_node == device // per_node]
            load = sent[0 if near else 1]
            owner = min(near or owners, key=lambda owner: load[owner])
            load[owner] += cut
            received[0 if near else 1][device] += cut
    most = [max([*received[i].values(), *sent[i].values()], default=0.0) for i in (0, 1)]
    return most[0], most[1], any(most)


Box = tuple[tuple[float, float], ...]


def _boxes(devices: tuple[int, ...], s: ParallelStrategy) -> Iterator[tuple[int, Box]]:
    shards = _shards(s)
    for index, device in enumerate(devices):
        pipe, data, tensor = index // (s.dp * s.tp), index // s.tp % s.dp, index % s.tp
        parts = ((pipe, s.pp), (tensor, s.tp), (data if shards > 1 else 0, shards))
        yield device, tuple((part / size, (part + 1) / size) for part, size in parts)


def _overlap(a: Box, b: Box) -> float:
    size = 1.0
    for (a0, a1), (b0, b1) in zip(a, b):
        if (length := min(a1, b1) - max(a0, b0)) <= 1e-12:
            return 0.0
        size *= length
    return size
