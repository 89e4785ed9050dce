"""What the planner weighs for a call."""

from dataclasses import replace

import pytest

from realjax.allocation.candidates import find_fault, list_choices, list_parts
from realjax.allocation.workload import Fixed
from realjax.core.layout import ParallelStrategy
from realjax.dataflow.graph import MicroBatches
from tests.given.workloads import make_call, make_cluster, make_role, make_shape

ROLE = make_role("actor", make_shape(7), is_trained=True)
TRAIN = make_call("actor_train", "train", ROLE)


def test_parts_of_a_node_are_aligned():
    parts = list_parts(make_cluster(1, 8))
    assert len(parts) == len(set(parts)) == 15
    assert {(part[0] % len(part), len(part) in (1, 2, 4, 8)) for part in parts} == {(0, True)}


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 7, 16, 128])
def test_larger_parts_are_whole_nodes(num_nodes):
    """Every device has a part, each cut of the cluster in two is there with its complement, and they stay few."""
    cluster = make_cluster(num_nodes, 8)
    parts = list_parts(cluster)
    every = set(range(cluster.num_devices))
    assert tuple(sorted(every)) in parts and len(parts) < 120
    for part in parts:
        assert list(part) == list(range(part[0], part[0] + len(part))) and set(part) <= every
        assert len(part) < 8 and part[0] // 8 == part[-1] // 8 or len(part) % 8 == 0 == part[0] % 8
        if part[0] == 0 and len(part) % 8 == 0 and len(part) < len(every) and num_nodes <= 16:
            assert tuple(range(len(part), cluster.num_devices)) in parts


@pytest.mark.parametrize("kind", ["train", "inference", "generate"])
@pytest.mark.parametrize("num_nodes", [1, 3])
def test_candidates_can_be_carried_out(kind, num_nodes):
    work = make_call("call", kind, ROLE, num_sequences=24)
    choices = list_choices(work, ROLE, make_cluster(num_nodes, 8))
    assert len(choices) == len(set(choices))
    for choice in choices:
        split = choice.strategy
        assert split.size == len(choice.devices)
        assert find_fault(work, split) is None
        assert split.row_multiple * choice.num_mbs <= 24
        groups = [choice.devices[i : i + split.tp] for i in range(0, split.size, split.tp)]
        assert all(group[0] // 8 == group[-1] // 8 for group in groups)
        assert split.zero_stage == 0 or kind == "train" and 4096 % split.dp == 0 and split.dp > 1
        assert not (split.sequence_parallel or choice.remat) or kind != "generate"
        assert (choice.num_slots is None) == (kind != "generate")
        assert kind != "generate" or choice.num_slots % split.row_multiple == 0


def test_what_is_open_is_weighed():
    choices = list_choices(TRAIN, ROLE, make_cluster())
    assert {choice.strategy.zero_stage for choice in choices} == {0, 2, 3}
    assert {choice.remat for choice in choices} == {choice.strategy.sequence_parallel for choice in choices}
    assert {choice.num_mbs for choice in choices} == {2**i for i in range(9)}
    assert {choice.strategy.pp for choice in choices} == {1, 2, 4, 8}


@pytest.mark.parametrize(
    "fixed",
    [
        Fixed(strategy=ParallelStrategy(dp=2, tp=2), devices=(4, 5, 6, 7)),
        Fixed(strategy=ParallelStrategy(dp=3)),
        Fixed(devices=(0, 2, 4, 6)),
        Fixed(zero_stage=3, remat=True),
        Fixed(micro_batches=MicroBatches(count=3)),
    ],
)
def test_what_is_fixed_stays(fixed):
    choices = list_choices(replace(TRAIN, fixed=fixed), ROLE, make_cluster())
    for choice in choices:
        assert fixed.devices in (None, choice.devices)
        assert fixed.strategy is None or replace(choice.strategy, zero_stage=0) == fixed.strategy
        assert fixed.zero_stage in (None, choice.strategy.zero_stage)
        assert fixed.remat in (None, choice.remat)
        assert fixed.micro_batches is None or choice.num_mbs == 3


def test_tokens_of_a_micro_batch_decide_their_number():
    """256 rows of 512 tokens on four devices, at most four rows at once: 64 micro-batches of one row a device."""
    fixed = Fixed(strategy=ParallelStrategy(dp=4), micro_batches=MicroBatches(max_tokens=4 * 512))
    choices = list_choices(replace(TRAIN, fixed=fixed), ROLE, make_cluster())
    assert {choice.num_mbs for choice in choices} == {64}


def test_layers_of_several_kinds_are_cut_where_they_can_be():
    role = make_role("actor", make_shape(7, cuts=(1, 2)))
    choices = list_choices(make_call("ref_inf", "inference", role), role, make_cluster())
    assert {choice.strategy.pp for choice in choices} == {1, 2}


@pytest.mark.parametrize(("num_nodes", "sizes"), [(1, {1, 2, 4, 8}), (4, {1, 2, 4, 8, 16, 32})])
def test_experts_are_shared_by_devices_that_share_the_batch(num_nodes, sizes):
    role = make_role("actor", make_shape(7, num_experts=64, experts_per_token=4))
    choices = list_choices(make_call("ref_inf", "inference", role), role, make_cluster(num_nodes, 8))
    assert {choice.expert_shards for choice in choices} == sizes
    assert all(choice.strategy.dp % choice.strategy.ep == 0 for choice in choices)
    assert {choice.strategy.ep for choice in list_choices(TRAIN, ROLE, make_cluster())} == {1}


def test_open_stages_leave_few_layers_empty():
    role = make_role("actor", make_shape(7, num_layers=31))
    choices = list_choices(make_call("ref_inf", "inference", role), role, make_cluster())
    assert {choice.strategy.pp for choice in choices} == {1, 2, 4, 8}
    role = make_role("actor", make_shape(7, num_layers=3))
    choices = list_choices(make_call("ref_inf", "inference", role), role, make_cluster())
    assert {choice.strategy.pp for choice in choices} == {1}


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (Fixed(strategy=ParallelStrategy(tp=3)), r"actor_train: d1p1m3 .* query heads of 32 .* tensor=3; change"),
        (Fixed(strategy=ParallelStrategy(pp=64)), r"actor_train: d1p64m1 needs 64 devices, but the cluster has 8"),
        (Fixed(strategy=ParallelStrategy(dp=2), devices=(0,)), r"needs 2 devices, but its mesh has 1"),
        (Fixed(strategy=ParallelStrategy(dp=2, ep=2)), r"a model without experts do not divide over expert=2; change"),
        (Fixed(devices=(7, 8)), r"devices 7-8 .* among the cluster's 8"),
        (Fixed(strategy=ParallelStrategy(dp=3), zero_stage=3), r"zero_stage=3 splits a hidden size of 4096"),
        (Fixed(strategy=ParallelStrategy(dp=4), micro_batches=MicroBatches(max_tokens=9)), r"max_tokens_per_mb=9"),
    ],
)
def test_a_fixed_call_that_cannot_be_is_refused(fixed, message):
    with pytest.raises(ValueError, match=message):
        list_choices(replace(TRAIN, fixed=fixed), ROLE, make_cluster())


def test_slots_that_do_not_divide_are_refused():
    fixed = Fixed(strategy=ParallelStrategy(dp=4), num_slots=6)
    work = make_call("actor_gen", "generate", ROLE, fixed=fixed)
    with pytest.raises(ValueError, match="num_slots=6 do not divide over data x pipeline = 4"):
        list_choices(work, ROLE, make_cluster())


def test_a_cluster_without_devices_is_refused():
    with pytest.raises(ValueError, match="no device"):
        list_choices(TRAIN, ROLE, make_cluster(0, 8))
