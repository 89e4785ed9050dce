import jax
import numpy as np
import pytest

from realjax.core.layout import Layout, ParallelStrategy
from realjax.reshard.plan import plan_reshard


def layout(dp: int = 1, pp: int = 1, tp: int = 1, first: int = 0) -> Layout:
    return Layout.of(ParallelStrategy(dp=dp, pp=pp, tp=tp), jax.devices()[first : first + dp * pp * tp])


def abstract(*shape: int, dtype=np.float32) -> dict:
    return {"w": jax.ShapeDtypeStruct(shape, dtype)}


@pytest.mark.parametrize(
    ("source", "destination", "moved", "kept"),
    [
        # Everything stays; half of each half moves; disjoint devices; every device lacks all but its own part.
        (layout(tp=4).sharding("tensor"), layout(tp=4).sharding("tensor"), 0, 64),
        (layout(tp=2).sharding("tensor"), layout(tp=4).sharding("tensor"), 48, 16),
        (layout(tp=2).sharding("tensor"), layout(tp=2, first=4).sharding("tensor"), 64, 0),
        (layout(tp=4).sharding("tensor"), layout(dp=4).sharding(), 3 * 64, 64),
        (layout(dp=4).sharding(), layout(tp=4).sharding("tensor"), 0, 64),
    ],
)
def test_bytes_are_those_that_a_device_lacks(source, destination, moved, kept):
    plan = plan_reshard(abstract(16), {"w": source}, {"w": destination})
    assert (plan.bytes_moved, plan.bytes_kept) == (moved, kept)


def test_moves_fill_every_destination_shard_exactly_once():
    source, destination = layout(pp=2, tp=3).sharding("pipe", "tensor"), layout(pp=3, tp=2).sharding("tensor", "pipe")
    (leaf,) = plan_reshard(abstract(12, 18), {"w": source}, {"w": destination}).leaves
    for device, index in destination.devices_indices_map((12, 18)).items():
        times_written = np.zeros((12, 18), int)
        for move in leaf.moves_to[device]:
            times_written[tuple(slice(*ends) for ends in move.box)] += 1
        assert (times_written[index] == 1).all()
        assert times_written.sum() == times_written[index].size


def test_replicas_share_the_sending():
    source, destination = layout(dp=4).sharding(), layout(dp=4, first=4).sharding()
    (leaf,) = plan_reshard(abstract(16), {"w": source}, {"w": destination}).leaves
    assert sorted(m.source.id for m in leaf.moves) == [d.id for d in jax.devices()[:4]]


def test_narrowing_is_done_before_the_move_and_widening_after_it():
    source, destination = layout(tp=2).sharding("tensor"), layout(tp=2, first=2).sharding("tensor")
    for old, new in ((np.float32, jax.numpy.bfloat16), (jax.numpy.bfloat16, np.float32)):
        plan = plan_reshard(abstract(16, dtype=old), {"w": source}, {"w": destination}, dtype=new)
        assert plan.bytes_moved == 2 * 16
    integers = plan_reshard(abstract(16, dtype=np.int32), {"w": source}, {"w": destination}, dtype=np.float16)
    assert integers.leaves[0].spec.dtype == np.int32


def test_a_move_to_host_memory_counts_as_moved():
    sharding = layout(tp=4).sharding("tensor")
    plan = plan_reshard(abstract(16), {"w": sharding}, {"w": sharding.with_memory_kind("pinned_host")})
    assert (plan.bytes_moved, plan.bytes_kept) == (64, 0)


def test_the_same_question_gives_the_same_plan():
    a, b = layout(tp=2), layout(tp=2, first=2)
    plans = [plan_reshard(abstract(16), {"w": a.sharding("tensor")}, {"w": b.sharding("tensor")}) for _ in range(2)]
    assert plans[0] is plans[1]


def test_the_table_names_every_leaf_and_both_layouts():
    source, destination = layout(tp=2).sharding("tensor"), layout(tp=2, first=4).sharding("tensor")
    lines = plan_reshard(abstract(2**20), {"w": source}, {"w": destination}).describe().splitlines()
    assert lines[1].split()[:3] == ["w", "1048576", "float32"]
    assert "of tensor2 on 0,1" in lines[1] and "of tensor2 on 4,5" in lines[1]
    assert lines[-1].split() == ["total", "4.0", "MiB", "0.0", "KiB"]


def test_misuse_is_named():
    sharding = layout(tp=4).sharding("tensor")
    with pytest.raises(ValueError, match="destination_shardings has 1 leaves.*missing: .'w'.*not in the tree: .'v'"):
        plan_reshard(abstract(16), {"w": sharding}, {"v": sharding})
    with pytest.raises(ValueError, match=r"reshard 'w': shape \(6,\) does not divide over \('tensor',\) of tensor4"):
        plan_reshard(abstract(6), {"w": layout().replicated}, {"w": sharding})
