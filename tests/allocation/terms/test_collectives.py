"""Groups of devices on the links that they cross, and collectives by the formulas of textbooks."""

from dataclasses import replace

import pytest

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Link, find_cluster
from realjax.allocation.measured import CollectivePoint, Measured
from realjax.allocation.terms.collectives import Group, collective_seconds, exposed, find_groups
from realjax.core.layout import ParallelStrategy

# Latency 1 and 10 bytes a second within nodes of 4, latency 5 and 1 byte a second between them.
CLUSTER = replace(
    find_cluster("h100x8"),
    num_nodes=2,
    devices_per_node=4,
    within_node=Link(bandwidth=10.0, latency=1.0),
    between_nodes=Link(bandwidth=1.0, latency=5.0),
    factors={},
)


@pytest.mark.parametrize(
    ("sizes", "tensor", "data", "pipe"),
    [
        ({"tp": 8}, Group(8, 2), Group(), Group()),
        ({"dp": 2, "tp": 4}, Group(4, 1), Group(2, 2), Group()),
        ({"pp": 2, "tp": 4}, Group(4, 1), Group(), Group(2, 2)),
        ({"pp": 2, "dp": 2, "tp": 2}, Group(2, 1), Group(2, 1), Group(2, 2)),
        ({"dp": 8}, Group(), Group(8, 2), Group()),
    ],
)
def test_groups_lie_where_the_mesh_puts_them(sizes, tensor, data, pipe):
    """Pipe outermost, tensor innermost, as in `core.layout.Layout`."""
    groups = find_groups(Choice(strategy=ParallelStrategy(**sizes), devices=tuple(range(8))), 4)
    assert (groups.tensor, groups.data, groups.pipe) == (tensor, data, pipe)


def test_devices_in_another_order_cross_other_links():
    strategy = ParallelStrategy(dp=4, tp=2)
    beside, apart = ((0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 1, 5, 2, 6, 3, 7))
    spans = [find_groups(Choice(strategy=strategy, devices=d), 4).tensor.num_nodes for d in (beside, apart)]
    assert spans == [1, 2]


def test_gradients_are_summed_over_context_too():
    choice = Choice(strategy=ParallelStrategy(dp=2, tp=2), devices=tuple(range(8)), context=2)
    groups = find_groups(choice, 4)
    assert (groups.context, groups.data) == (Group(2, 1), Group(4, 2))


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all_gather", 3 + 3 / 4 * 8),
        ("reduce_scatter", 3 + 3 / 4 * 8),
        ("all_reduce", 2 * (3 + 3 / 4 * 8)),
        ("all_to_all", 3 + 3 / 4 * 8),
        ("permute", 1 + 8),
    ],
)
def test_rings_within_a_node(kind, seconds):
    """80 bytes on four devices: (n-1) steps of the latency, (n-1)/n of the bytes, twice in an all-reduce."""
    assert collective_seconds(kind, 80.0, Group(4, 1), CLUSTER) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        # Four devices of a node bring four links to the other node.
        ("all_gather", Group(8, 2), 3 + 5 + 7 / 8 * 80 / 4),
        ("all_reduce", Group(2, 2), 2 * (5 + 1 / 2 * 80)),
        # Half of what a device sends leaves its node, by its own link.
        ("all_to_all", Group(8, 2), 3 + 5 + 80 / 2),
        ("permute", Group(2, 2), 5 + 80),
    ],
)
def test_rings_between_nodes(kind, group, seconds):
    assert collective_seconds(kind, 80.0, group, CLUSTER) == pytest.approx(seconds)


def test_one_device_tells_nobody():
    assert collective_seconds("all_reduce", 80.0, Group(), CLUSTER) == 0


def test_measured_collectives_come_first():
    """On straight lines between sizes, and scaled to other numbers of devices as rings are."""
    make = lambda size, seconds: CollectivePoint(
        kind="all_gather", span="within_node", num_devices=2, num_bytes=size, seconds=seconds
    )
    cluster = replace(CLUSTER, measured=Measured(collectives=(make(200, 3.0), make(100, 2.0))))
    took = lambda size, group, kind="all_gather": collective_seconds(kind, size, group, cluster)
    assert [took(size, Group(2, 1)) for size in (50, 100, 150, 400)] == pytest.approx([2.0, 2.0, 2.5, 6.0])
    assert took(100, Group(4, 1)) == pytest.approx(2.0 * (3 / 4) / (1 / 2))
    # No table of that kind, or of links between nodes.
    assert took(80.0, Group(2, 2)) == collective_seconds("all_gather", 80.0, Group(2, 2), CLUSTER)
    assert took(80.0, Group(4, 1), "all_reduce") == collective_seconds("all_reduce", 80.0, Group(4, 1), CLUSTER)


def test_what_computation_hides():
    assert exposed(3.0, 2.0, 0.5) == 2.0 and exposed(1.0, 4.0, 0.5) == 0.0 and exposed(1.0, 4.0, 0.0) == 1.0
