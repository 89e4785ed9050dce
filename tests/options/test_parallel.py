"""Parallel sizes and what allocation_mode makes of them."""

from itertools import permutations

import pytest

from realjax.core.layout import ParallelStrategy
from realjax.options.parallel import MFCConfig, ParallelismConfig, resolve_parallelism

MACHINE = {"n_nodes": 2, "n_gpus_per_node": 4}


def resolve(mode, is_train=True, manual=None):
    return resolve_parallelism(mode, manual or ParallelismConfig(), **MACHINE, is_train=is_train)


def test_strategy_keeps_every_size():
    sizes = ParallelismConfig(
        data_parallel_size=2, pipeline_parallel_size=3, model_parallel_size=5, use_sequence_parallel=True
    )
    assert sizes.strategy(zero_stage=1) == ParallelStrategy(dp=2, pp=3, tp=5, sequence_parallel=True, zero_stage=1)
    assert sizes.num_devices == sizes.strategy().size == 30


@pytest.mark.parametrize("letters", ["".join(order) for order in permutations("dpm")])
def test_sizes_in_any_letter_order(letters):
    sizes = {"d": 2, "p": 1, "m": 4}
    found = resolve("".join(f"{letter}{sizes[letter]}" for letter in letters))
    assert found == ParallelismConfig(data_parallel_size=2, model_parallel_size=4, use_sequence_parallel=True)


@pytest.mark.parametrize(("mode", "sizes"), [("pipe_model", (1, 2, 4)), ("pipe_data", (4, 2, 1))])
def test_named_modes_use_the_whole_machine(mode, sizes):
    found = resolve(mode)
    assert (found.data_parallel_size, found.pipeline_parallel_size, found.model_parallel_size) == sizes
    assert found.num_devices == 8


def test_sequence_parallel_is_for_sharded_training():
    assert resolve("d2p2m2").use_sequence_parallel
    assert not resolve("d2p2m2", is_train=False).use_sequence_parallel
    assert not resolve("pipe_data").use_sequence_parallel


def test_manual_keeps_what_was_given():
    manual = ParallelismConfig(model_parallel_size=2, data_parallel_size=4)
    assert resolve("manual", manual=manual) is manual


@pytest.mark.parametrize(
    "mode",
    ["d8", "d4m2", "d4p1m2x", "xd4p1m2", "d4d1m2", "d4p1p2", "d0p1m8", "d4p1m", "", "auto", "heuristic", "search"],
)
def test_other_modes_are_refused(mode):
    with pytest.raises(ValueError, match="^allocation_mode: found"):
        resolve(mode)


def test_micro_batches_by_count_or_by_tokens_not_both():
    assert MFCConfig(n_mbs=2).n_mbs == 2
    assert MFCConfig(max_tokens_per_mb=4096).max_tokens_per_mb == 4096
    with pytest.raises(ValueError, match="max_tokens_per_mb: found 4096 together with n_mbs=2"):
        MFCConfig(n_mbs=2, max_tokens_per_mb=4096)
