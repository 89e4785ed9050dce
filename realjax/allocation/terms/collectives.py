"""Seconds of collectives, by alpha-beta on the links that a group of devices really crosses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.measured import Collective, CollectivePoint, Span


@dataclass(frozen=True)
class Group:
    """Devices that take part in a collective, and on how many nodes they are."""

    size: int = 1
    num_nodes: int = 1

    @property
    def per_node(self) -> float:
        """Devices of the group on one of its nodes."""
        return self.size / self.num_nodes

    @property
    def span(self) -> Span:
        """The farthest link that the group crosses."""
        return "between_nodes" if self.num_nodes > 1 else "within_node"

    def times_ring(self, num_devices: int) -> float:
        """Returns how many times as long a ring of this group takes as one of so many devices: by (n-1)/n."""
        return (1 - 1 / self.size) / (1 - 1 / num_devices)


@dataclass(frozen=True)
class Groups:
    """The groups of a choice, by what they share. Each is the one of its kind that lies on the most nodes."""

    tensor: Group
    context: Group
    experts: Group
    data: Group  # with context: all that hold the same parameters
    replicas: Group  # of them, those that have the same experts
    pipe: Group
    vocab: Group  # tensor and pipe, over which realjax splits the vocabulary


def find_groups(choice: Choice, devices_per_node: int) -> Groups:
    """Returns the groups of a choice's mesh: pipe outermost, then data, context, and tensor innermost.

    Devices that share experts are next to each other along data.
    """
    s = choice.strategy
    return _find_groups(choice.devices, devices_per_node, (s.pp, s.dp, choice.context, s.tp), choice.expert_shards)


@lru_cache(maxsize=4096)
def _find_groups(devices: tuple[int, ...], per_node: int, sizes: tuple[int, int, int, int], experts: int) -> Groups:
    nodes = [device // per_node for device in devices]
    pp, dp, cp, tp = sizes
    alike = dp * cp
    return Groups(
        tensor=_widest(nodes, stride=1, size=tp),
        context=_widest(nodes, stride=tp, size=cp),
        experts=_widest(nodes, stride=tp, size=experts),
        data=_widest(nodes, stride=tp, size=alike),
        replicas=_widest(nodes, stride=tp * experts, size=max(1, alike // experts)),
        pipe=_widest(nodes, stride=tp * alike, size=pp),
        vocab=Group(tp * pp, len(set(nodes)) if pp > 1 else _widest(nodes, 1, tp).num_nodes),
    )


def _widest(nodes: Sequence[int], stride: int, size: int) -> Group:
    """Returns the group of `size` devices a `stride` apart that lies on the most nodes."""
    if size == 1:
        return Group()
    block = stride * size
    starts = (start + offset for start in range(0, len(nodes), block) for offset in range(stride))
    return Group(size, max(len(set(nodes[start : start + block : stride])) for start in starts))


def collective_seconds(kind: Collective, num_bytes: float, group: Group, cluster: Cluster) -> float:
    """Returns how long a collective takes; bytes as in `CollectivePoint`.

    Of n devices on m nodes, ring algorithms (Thakur, Rabenseifner and Gropp, 2005): (n-1)/n of the bytes go through the
    slowest link, once in an all-gather and a reduce-scatter, twice in an all-reduce. Devices of a node each bring their
    own link to other nodes, so a ring of k devices a node has k times its bandwidth there. Latency: (k-1) steps within
    nodes and (m-1) between.
    """
    n, m = group.size, group.num_nodes
    if n == 1 or num_bytes <= 0:
        return 0.0
    if cluster.measured.collectives and (found := _measured(kind, num_bytes, group, cluster)) is not None:
        return found
    share, k = cluster.factor("links"), n / m
    inside, outside = cluster.within_node, cluster.between_nodes
    latency = (k - 1) * inside.latency + (m - 1) * outside.latency
    if kind == "permute":
        link = outside if m > 1 else inside
        return link.latency + num_bytes / (share * link.bandwidth)
    if kind == "all_to_all":
        away = num_bytes * (n - k) / n / (share * outside.bandwidth)
        return latency + max(away, num_bytes * (k - 1) / n / (share * inside.bandwidth))
    bandwidth = inside.bandwidth if m == 1 else min(inside.bandwidth, k * outside.bandwidth)
    turns = 2 if kind == "all_reduce" else 1
    return turns * (latency + (n - 1) / n * num_bytes / (share * bandwidth))


def _measured(kind: Collective, num_bytes: float, group: Group, cluster: Cluster) -> float | None:
    """Returns the seconds by the table: of the nearest number of devices, and between the nearest sizes.

    Other numbers of devices are scaled as a ring is, by (n-1)/n. None where the table has no such collective.
    """
    points = [point for point in cluster.measured.collectives if (point.kind, point.span) == (kind, group.span)]
    if not points:
        return None
    nearest = min({point.num_devices for point in points}, key=lambda n: abs(n - group.size))
    ring = 1.0 if kind == "permute" else group.times_ring(nearest)
    return ring * _between([point for point in points if point.num_devices == nearest], num_bytes)


def _between(points: Sequence[CollectivePoint], num_bytes: float) -> float:
    """Returns seconds on straight lines between points; below the smallest those of the smallest, above the largest by
    its bandwidth."""
    points = sorted(points, key=lambda point: point.num_bytes)
    if num_bytes <= points[0].num_bytes:
        return points[0].seconds
    if num_bytes >= points[-1].num_bytes:
        return points[-1].seconds * num_bytes / points[-1].num_bytes
    for low, high in zip(points, points[1:]):
        if num_bytes <= high.num_bytes:
            share = (num_bytes - low.num_bytes) / (high.num_bytes - low.num_bytes)
            return low.seconds + share * (high.seconds - low.seconds)
    raise AssertionError("the sizes are sorted")


def exposed(comm: float, compute: float, overlap: float) -> float:
    """Returns the seconds of communication that computation does not hide: at most a share `overlap` of what is
    computed meanwhile hides as much of it."""
    return max(0.0, comm - overlap * compute)
