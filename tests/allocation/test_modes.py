"""What allocation_mode makes of a machine and of the sizes that calls were given."""

from itertools import permutations

import pytest

from realjax.allocation.modes import check_options, choose_devices, choose_strategy, list_notices
from realjax.core.layout import ParallelStrategy
from realjax.dataflow.run import AllocationOptions, CallPlacement

MANUAL = ParallelStrategy(tp=2, dp=4)


def make_options(mode: str, strategy: ParallelStrategy = MANUAL, mesh: str | None = None, **changes):
    calls = {"train": CallPlacement(strategy=strategy, device_mesh=mesh)}
    return AllocationOptions(**{"mode": mode, "n_nodes": 2, "n_gpus_per_node": 4, "calls": calls, **changes})


def resolve(mode: str, *, is_train: bool = True) -> ParallelStrategy:
    return choose_strategy(make_options(mode), "train", is_train=is_train)


@pytest.mark.parametrize("letters", ["".join(order) for order in permutations("dpm")])
def test_sizes_in_any_letter_order(letters):
    sizes = {"d": 2, "p": 1, "m": 4}
    found = resolve("".join(f"{letter}{sizes[letter]}" for letter in letters))
    assert found == ParallelStrategy(dp=2, tp=4, sequence_parallel=True)


def test_devices_of_a_mode_may_share_experts():
    found = resolve("m2d4e2p1")
    assert found == ParallelStrategy(dp=4, tp=2, ep=2, sequence_parallel=True) and found.size == 8
    with pytest.raises(ValueError, match=r"^allocation_mode: found 'd4e3p1m2', whose e3 does not divide its d4; "):
        check_options(make_options("d4e3p1m2"))


@pytest.mark.parametrize(("mode", "sizes"), [("pipe_model", (1, 2, 4)), ("pipe_data", (4, 2, 1))])
def test_named_modes_use_the_whole_machine(mode, sizes):
    found = resolve(mode)
    assert (found.dp, found.pp, found.tp) == sizes
    check_options(make_options(mode))
    assert choose_devices(make_options(mode), "train", found) == tuple(range(8))


def test_sequence_parallel_is_for_sharded_training():
    assert resolve("d2p2m2").sequence_parallel
    assert not resolve("d2p2m2", is_train=False).sequence_parallel
    assert not resolve("pipe_data").sequence_parallel


def test_manual_keeps_what_was_given_and_the_others_say_that_they_do_not():
    assert resolve("manual") is MANUAL
    assert list(list_notices(make_options("manual"))) == []
    (notice,) = list_notices(make_options("pipe_data"))
    assert notice == "train.parallel is not used: allocation_mode=pipe_data sets the sizes."
    (nodes,) = list_notices(make_options("manual", nodelist="A,B"))
    assert nodes.startswith("nodelist has no effect")


@pytest.mark.parametrize(
    "mode",
    ["d8", "d4m2", "d4p1m2x", "xd4p1m2", "d4d1m2", "d4p1p2", "d0p1m8", "d4p1m", "", "auto", "d4p1e2", "d4p1m2e1e1"],
)
def test_other_modes_are_refused(mode):
    with pytest.raises(ValueError, match="^allocation_mode: found"):
        check_options(make_options(mode))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (make_options("heuristic"), "^allocation_mode: heuristic has no rules for this experiment; use search, manual"),
        (make_options("search", mesh="NODE03"), "^train.device_mesh: "),
        (
            make_options("d2p1m2", n_nodes=1, n_gpus_per_node=8),
            r"^allocation_mode: d2p1m2: .* = 2\*1\*2 = 4 devices, .* = 8; set n_gpus_per_node=4",
        ),
        (
            make_options("manual", ParallelStrategy(dp=2, tp=2)),
            r"^train.parallel: .* = 2\*1\*2 = 4 devices, but n_nodes\*n_gpus_per_node = 8; choose sizes",
        ),
        (make_options("pipe_model", mesh="NODE01:0,1"), "^train.device_mesh: found 'NODE01:0,1', but allocation_mode"),
        (make_options("manual", mesh="NODE01:0,1"), "^train.device_mesh: 'NODE01:0,1' has 2 devices, but train.para"),
        (make_options("manual", mesh="NODE01", nodelist="A"), "^nodelist: 'A' names 1 nodes, but n_nodes=2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(options)


def test_a_mesh_is_a_part_of_the_machine():
    options = make_options("manual", ParallelStrategy(dp=2), "NODE02:1,3")
    check_options(options)
    assert choose_devices(options, "train", ParallelStrategy(dp=2)) == (5, 7)
