"""Seconds of parameters on their way: from one call's layout to another's, and from host memory."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster, Link
from realjax.allocation.measured import Span
from realjax.allocation.terms.measured_layers import find_measured
from realjax.allocation.terms.messages import count_kernels
from realjax.allocation.terms.rates import BYTES
from realjax.allocation.workload import RoleWork
from realjax.core.layout import ParallelStrategy


def move_terms(role: RoleWork, source: Choice, destination: Choice, cluster: Cluster) -> dict[str, float]:
    """Returns a cast to the compute dtype where parameters are float32 masters, then the busiest device's traffic over
    each kind of link, as `reshard/plan.py` moves: what a device holds stays, the rest comes from its own node first."""
    width, kept_as = BYTES[role.dtype], 4 if role.is_trained or role.is_averaged else BYTES[role.dtype]
    source = _lie_at_home(role, source)
    num_messages = count_kernels(role.model) if cluster.platform == "cpu" else 1
    size = role.model.num_params * _moved_share(role)
    terms = {}
    if kept_as > width:
        terms["cast"] = (kept_as + width) * size * _part(role, source.strategy) / cluster.memory_bandwidth
    within, between, moved = _traffic_of_all(role, source, destination, cluster)
    if not moved:
        return terms
    spans: dict[Span, tuple[float, Link]] = {
        "within_node": (within, cluster.within_node),
        "between_nodes": (between, cluster.between_nodes),
    }
    for span, (traffic, link) in spans.items():
        if not traffic:
            continue
        num_bytes = traffic * size * width
        if any(point.span == span for point in cluster.measured.moves):
            terms[span] = find_measured(cluster, role.dtype).move(num_bytes, span)
        else:
            terms[span] = num_messages * link.latency + num_bytes / (cluster.factor("links") * link.bandwidth)
    return terms | {"dispatch": 3 * cluster.dispatch_seconds}


def fetch_terms(role: RoleWork, destination: Choice, cluster: Cluster) -> dict[str, float]:
    """Returns each device's part of the parameters over its link to the host, all devices at once."""
    part = role.model.num_params * BYTES[role.dtype] * _part(role, destination.strategy)
    share = cluster.factor("links")
    link = cluster.to_host
    return {"host": link.latency + part / (share * link.bandwidth), "dispatch": cluster.dispatch_seconds}


def moved_bytes(role: RoleWork, source: Choice, destination: Choice, cluster: Cluster) -> float:
    """Returns the bytes of a role's parameters that go from one device to another for a copy in another layout."""
    moved = _traffic_of_all(role, _lie_at_home(role, source), destination, cluster)[2] * _moved_share(role)
    return moved * role.model.num_params * BYTES[role.dtype]


def fetched_bytes(role: RoleWork, destination: Choice) -> float:
    """Returns the bytes of a role's parameters that go from host memory to all devices of a call."""
    s = destination.strategy
    return role.model.num_params * BYTES[role.dtype] * s.size * _part(role, s)


def _lie_at_home(role: RoleWork, home: Choice) -> Choice:
    """Returns a home's choice, split as its parameters are: from ZeRO's first stage on, masters are over `data`."""
    if not (role.is_trained and home.strategy.zero_stage):
        return home
    return replace(home, strategy=replace(home.strategy, zero_stage=3))


def _moved_share(role: RoleWork) -> float:
    """Returns which share of the parameters goes to another layout in each step: what lies beside adapters is there."""
    return 0.0 if role.is_beside else role.trained_share


def _part(role: RoleWork, s: ParallelStrategy) -> float:
    """Returns which share of a model's parameters a device of a layout has."""
    of_experts = role.model.experts_share
    return sum(
        share / math.prod(_cuts(s, are_experts)) for share, are_experts in ((1 - of_experts, False), (of_experts, True))
    )


def _traffic_of_all(role: RoleWork, source: Choice, to: Choice, cluster: Cluster) -> tuple[float, float, float]:
    """Returns the traffic of experts and that of all other parameters, as if one device had the most of both."""
    of_experts = role.model.experts_share if max(source.strategy.ep, to.strategy.ep) > 1 else 0.0
    traffic = lambda are_experts: _traffic(
        source.devices, source.strategy, to.devices, to.strategy, cluster.devices_per_node, are_experts
    )
    if not of_experts:
        return traffic(False)
    within, between, moved = (
        (1 - of_experts) * others + of_experts * own for others, own in zip(traffic(False), traffic(True))
    )
    return within, between, moved


@lru_cache(maxsize=65536)
def _traffic(
    devices: tuple[int, ...],
    strategy: ParallelStrategy,
    to: tuple[int, ...],
    other: ParallelStrategy,
    per_node: int,
    are_experts: bool,
) -> tuple[float, float, float]:
    """Returns the most that a device sends or receives within its node and between nodes, and all that moves, as shares
    of the parameters.

    Parameters are a box of layers x experts x widths x shards, cut by both layouts: pipe cuts layers, tensor widths,
    and ZeRO's third stage a dim of its own; what is not of experts has one of them. Of the replicas of a piece, a
    device's own comes first, then one of its node, then the one that sends least.
    """
    if devices == to and strategy == other:
        return 0.0, 0.0, 0.0
    holders: dict[Box, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # by box and node
    own = dict(_boxes(devices, strategy, are_experts))
    for device, box in own.items():
        holders[box][device // per_node].append(device)
    everywhere = {box: [device for near in nodes.values() for device in near] for box, nodes in holders.items()}
    received, sent = (defaultdict(float), defaultdict(float)), (defaultdict(float), defaultdict(float))
    for device, box in _boxes(to, other, are_experts):
        for held, cut in _overlaps(box, _cuts(other, are_experts), _cuts(strategy, are_experts)):
            if own.get(device) == held:
                continue
            near = holders[held].get(device // per_node)
            link = 0 if near else 1
            owner = min(near or everywhere[held], key=sent[link].__getitem__)
            sent[link][owner] += cut
            received[link][device] += cut
    most = [max([*received[i].values(), *sent[i].values()], default=0.0) for i in (0, 1)]
    return most[0], most[1], sum(sum(arrived.values()) for arrived in received)


Box = tuple[int, int, int, int]  # which part of the layers, experts, widths and shards


def _cuts(s: ParallelStrategy, are_experts: bool) -> Box:
    """Returns in how many parts a layout cuts layers, experts, widths and shards."""
    ep = s.ep if are_experts else 1
    return s.pp, ep, s.tp, s.dp // ep if s.zero_stage == 3 else 1


def _boxes(devices: tuple[int, ...], s: ParallelStrategy, are_experts: bool) -> Iterator[tuple[int, Box]]:
    _, ep, _, shards = _cuts(s, are_experts)
    for index, device in enumerate(devices):
        pipe, data, tensor = index // (s.dp * s.tp), index // s.tp % s.dp, index % s.tp
        yield device, (pipe, data % ep, tensor, data // ep if shards > 1 else 0)


@lru_cache(maxsize=65536)
def _overlaps(box: Box, sizes: Box, other_sizes: Box) -> list[tuple[Box, float]]:
    """Returns the boxes of another layout's cuts that a box of one layout's overlaps, and by which share of all."""
    dims = []
    for part, size, other in zip(box, sizes, other_sizes):
        start, stop = part * other, (part + 1) * other  # in parts of 1 / (size * other)
        parts = range(start // size, -(-stop // size))
        dims.append([(i, (min(stop, (i + 1) * size) - max(start, i * size)) / (size * other)) for i in parts])
    return [((i, e, j, k), a * b * c * d) for (i, a), (e, b), (j, c), (k, d) in itertools.product(*dims)]
