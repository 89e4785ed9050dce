"""The collective route, forced in one process; test_processes.py takes it where it is the only one."""

import jax
import numpy as np
import pytest

from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import unflatten_paths
from realjax.reshard import apply, movers
from realjax.reshard.exchange import make_schedule
from realjax.reshard.movers import MOVERS
from realjax.reshard.plan import plan_reshard
from tests.reshard.cases import DTYPES, check_equal, make_host_tree, make_shardings, place

CHUNK = 2**28


def plan_pair(variant: str, dtype: str, here: str, there: str):
    host = make_host_tree(variant, DTYPES[dtype])
    source, destination = make_shardings(variant, here), make_shardings(variant, there)
    return host, source, destination, plan_reshard(host, source, destination)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("mixed", "tensor8-permuted"),
        ("first-half", "second-half"),
        ("zero3", "middle"),
        ("single", "mixed"),
        ("host", "host-half"),
    ],
)
def test_pieces_arrive_bitwise_between_any_device_sets(here, there):
    host, source, destination, plan = plan_pair("everything", "bfloat16", here, there)
    arrays = jax.tree.leaves(place(host, source))
    moved = MOVERS["exchange"](list(plan.leaves), arrays, True, CHUNK)
    check_equal(unflatten_paths({p.spec.path: a for p, a in zip(plan.leaves, moved)}), host, destination)
    assert all(a.is_deleted() for a in arrays)


@pytest.mark.parametrize("chunk_bytes", [100, 1000])
def test_pieces_larger_than_the_chunk_go_in_slabs(chunk_bytes):
    host, source, destination, plan = plan_pair("tied", "float32", "mixed", "tensor8-permuted")
    leaf = next(p for p in plan.leaves if p.spec.path == "layers/mlp")
    schedule = make_schedule(leaf, chunk_bytes)
    assert schedule.num_slabs > 1
    array = place(host, source)["layers"]["mlp"]
    (moved,) = MOVERS["exchange"]([leaf], [array], False, chunk_bytes)
    check_equal({"w": moved}, {"w": host["layers"]["mlp"]}, {"w": destination["layers"]["mlp"]})


def test_a_slab_stages_no_more_than_the_chunk():
    *_, plan = plan_pair("everything", "float32", "mixed", "data8")
    for leaf in plan.leaves:
        for chunk_bytes in (2**9, 2**12, 2**20):
            schedule = make_schedule(leaf, chunk_bytes)
            unit = schedule.slab_bytes // schedule.slab_shape[schedule.slab_dim] if schedule.slab_shape else CHUNK
            assert schedule.slab_bytes <= max(chunk_bytes, unit)


def test_a_tree_stages_no_more_than_the_chunk_with_two_groups_under_way(monkeypatch):
    for module in (movers, apply):
        monkeypatch.setattr(module, "find_route", lambda leaf: "exchange")
    movers.make_bundles.cache_clear()
    host = make_host_tree("everything", DTYPES["float32"])
    source, destination = make_shardings("everything", "mixed"), make_shardings("everything", "tensor8")
    for chunk_bytes in (4096, 2**14):
        moved, report = apply.reshard(place(host, source), destination, chunk_bytes=chunk_bytes)
        check_equal(moved, host, destination)
        assert chunk_bytes / 8 < report.staged_bytes <= chunk_bytes
    movers.make_bundles.cache_clear()


def test_shards_of_which_neither_divides_the_other_are_cut_into_common_cells():
    devices = jax.devices()
    three, two = (Layout.of(ParallelStrategy(tp=n), devices[:n]).sharding("tensor") for n in (3, 2))
    values = np.arange(24, dtype=np.float32).reshape(12, 2)
    plan = plan_reshard({"w": values}, {"w": three}, {"w": two})
    (moved,) = MOVERS["exchange"](list(plan.leaves), [jax.device_put(values, three)], False, CHUNK)
    check_equal({"w": moved}, {"w": values}, {"w": two})


def test_in_a_round_a_device_sends_and_receives_once_and_all_moves_are_made():
    *_, plan = plan_pair("everything", "float32", "zero3", "mixed-permuted")
    for leaf in plan.leaves:
        schedule = make_schedule(leaf, CHUNK)
        for turn in schedule.rounds:
            assert len(turn.reads) == len(turn.writes) == len(turn.pairs)
        assert sum(len(turn.pairs) for turn in schedule.rounds) == len(leaf.moves)
        busiest = max(len(moves) for moves in leaf.moves_to.values())
        assert len(schedule.rounds) <= 2 * max(busiest, 1)
