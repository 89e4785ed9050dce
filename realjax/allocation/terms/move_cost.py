"""Seconds of parameters on their way: from one call's layout to another's, and from host memory."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.terms.rates import BYTES
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
    within, between, moved = _traffic(
        source.devices, source.strategy, destination.devices, destination.strategy, cluster.devices_per_node
    )
    if not moved:
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


def moved_bytes(role: RoleWork, source: Choice, destination: Choice, cluster: Cluster) -> float:
    """Returns the bytes of a role's parameters that go from one device to another for a copy in another layout."""
    moved = _traffic(
        source.devices, source.strategy, destination.devices, destination.strategy, cluster.devices_per_node
    )[2]
    return moved * role.model.num_params * BYTES[role.dtype]


def fetched_bytes(role: RoleWork, destination: Choice) -> float:
    """Returns the bytes of a role's parameters that go from host memory to all devices of a call."""
    s = destination.strategy
    return role.model.num_params * BYTES[role.dtype] * s.size / (s.pp * s.tp * _shards(s))


def _shards(strategy: ParallelStrategy) -> int:
    return strategy.dp if strategy.zero_stage == 3 else 1


@lru_cache(maxsize=65536)
def _traffic(
    devices: tuple[int, ...], strategy: ParallelStrategy, to: tuple[int, ...], other: ParallelStrategy, per_node: int
) -> tuple[float, float, float]:
    """Returns the most that a device sends or receives within its node and between nodes, and all that moves, as shares
    of the parameters.

    Parameters are a box of layers x widths x shards, cut by both layouts: pipe cuts layers, tensor widths, and ZeRO's
    third stage a dim of its own. Of the replicas of a piece, a device's own comes first, then one of its node, then the
    one that sends least.
    """
    if devices == to and strategy == other:
        return 0.0, 0.0, 0.0
    holders: dict[Box, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # by box and node
    own = dict(_boxes(devices, strategy))
    for device, box in own.items():
        holders[box][device // per_node].append(device)
    everywhere = {box: [device for near in nodes.values() for device in near] for box, nodes in holders.items()}
    received, sent = (defaultdict(float), defaultdict(float)), (defaultdict(float), defaultdict(float))
    for device, box in _boxes(to, other):
        for held, cut in _overlaps(box, _cuts(other), _cuts(strategy)):
            if own.get(device) == held:
                continue
            near = holders[held].get(device // per_node)
            link = 0 if near else 1
            owner = min(near or everywhere[held], key=sent[link].__getitem__)
            sent[link][owner] += cut
            received[link][device] += cut
    most = [max([*received[i].values(), *sent[i].values()], default=0.0) for i in (0, 1)]
    return most[0], most[1], sum(sum(arrived.values()) for arrived in received)


Box = tuple[int, int, int]  # which part of the layers, widths and shards


def _cuts(s: ParallelStrategy) -> Box:
    """Returns in how many parts a layout cuts layers, widths and shards."""
    return s.pp, s.tp, _shards(s)


def _boxes(devices: tuple[int, ...], s: ParallelStrategy) -> Iterator[tuple[int, Box]]:
    for index, device in enumerate(devices):
        pipe, data, tensor = index // (s.dp * s.tp), index // s.tp % s.dp, index % s.tp
        yield device, (pipe, tensor, data if _shards(s) > 1 else 0)


@lru_cache(maxsize=65536)
def _overlaps(box: Box, sizes: Box, other_sizes: Box) -> list[tuple[Box, float]]:
    """Returns the boxes of another layout's cuts that a box of one layout's overlaps, and by which share of all."""
    dims = []
    for part, size, other in zip(box, sizes, other_sizes):
        start, stop = part * other, (part + 1) * other  # in parts of 1 / (size * other)
        parts = range(start // size, -(-stop // size))
        dims.append([(i, (min(stop, (i + 1) * size) - max(start, i * size)) / (size * other)) for i in parts])
    return [((i, j, k), a * b * c) for (i, a), (j, b), (k, c) in itertools.product(*dims)]
