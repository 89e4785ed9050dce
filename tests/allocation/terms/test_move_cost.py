"""What moves between two layouts."""

import itertools
from dataclasses import replace

import pytest

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import find_cluster
from realjax.allocation.measured import Measured, MovePoint
from realjax.allocation.terms.move_cost import move_terms, moved_bytes
from realjax.allocation.workload import ModelShape, RoleWork
from realjax.core.layout import ParallelStrategy
from tests.given.models import make_model

ROLE = RoleWork(name="role", model=ModelShape.of(make_model().config), dtype="bfloat16")


@pytest.mark.parametrize(
    ("devices", "source", "to", "destination"),
    [
        (range(4), ParallelStrategy(dp=2, tp=2), range(8), ParallelStrategy(pp=2, tp=4)),
        (range(8), ParallelStrategy(dp=8, zero_stage=3), range(4), ParallelStrategy(tp=4)),
        (range(4, 8), ParallelStrategy(pp=4), range(8), ParallelStrategy(dp=4, tp=2)),
    ],
)
def test_what_moves_is_what_each_device_lacks(devices, source, to, destination):
    """Against a walk over small pieces of the parameters, one by one."""
    before = Choice(strategy=source, devices=tuple(devices))
    after = Choice(strategy=destination, devices=tuple(to))
    held, wanted = hold_cells(before), hold_cells(after)
    lacking = sum(len(cells - held.get(device, set())) for device, cells in wanted.items())
    found = moved_bytes(ROLE, before, after, find_cluster("h100")) / (2 * ROLE.model.num_params)
    assert found == pytest.approx(lacking / 8**3)


def hold_cells(choice: Choice) -> dict[int, set]:
    """Returns which of 8 x 8 x 8 cells of the parameters each device holds."""
    strategy = choice.strategy
    shards = strategy.dp if strategy.zero_stage == 3 else 1
    cells = dict[int, set]()
    for index, device in enumerate(choice.devices):
        places = (
            index // (strategy.dp * strategy.tp),
            index % strategy.tp,
            index // strategy.tp % strategy.dp % shards,
        )
        sizes = (strategy.pp, strategy.tp, shards)
        cells[device] = set(itertools.product(*(range(p * 8 // n, (p + 1) * 8 // n) for p, n in zip(places, sizes))))
    return cells


def test_measured_moves_count_instead_of_the_link():
    """By the bytes of the busiest device: of two that share the parameters each lacks a half."""
    h100s, size = find_cluster("h100"), 2 * ROLE.model.num_params
    points = tuple(MovePoint(span="within_node", num_bytes=round(size * n), seconds=3.0 * n) for n in (0.5, 2.0))
    measured = replace(h100s, name="measured", measured=Measured(moves=points))
    sharded, whole = (Choice(strategy=ParallelStrategy(dp=2, zero_stage=stage), devices=(0, 1)) for stage in (3, 0))
    terms = move_terms(ROLE, sharded, whole, measured)
    assert terms["within_node"] == pytest.approx(1.5)
    assert move_terms(ROLE, sharded, whole, h100s)["within_node"] < 1e-3
    apart = Choice(strategy=ParallelStrategy(), devices=(h100s.devices_per_node,))
    assert move_terms(ROLE, whole, apart, measured) == move_terms(ROLE, whole, apart, h100s)
