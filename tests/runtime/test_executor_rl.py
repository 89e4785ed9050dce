"""Steps of PPO leave nothing behind in device memory, and run where the plan says."""

import gc
from collections import Counter

import jax
import numpy as np
import pytest

from tests.given.models import quick_compiles
from tests.given.runs import LAYOUTS, build_rl_spec, load_executor

STEPS = 24  # three epochs


def live_bytes() -> Counter[str]:
    """Returns the bytes of all arrays by kind of memory."""
    gc.collect()
    held: Counter[str] = Counter()
    for array in jax.live_arrays():
        held[str(array.sharding.memory_kind)] += sum(shard.data.nbytes for shard in array.addressable_shards)
    return held


@pytest.mark.slow
def test_memory_returns_to_its_level_after_each_step(given, tmp_path):
    """Calls on halves of the devices, with parameters moved between them, a reference that is averaged, and others that
    wait in host memory.
    """
    # Sequences of one length make batches of one shape.
    same = {"dataset__pad_to_max_length": True, "algo__gen__min_new_tokens": 8, "dataset__train_bs_n_seqs": 4}
    spec = build_rl_spec(given, tmp_path, **LAYOUTS["halves"], **same, algo__ref_ema_eta=0.1, total_train_epochs=3)
    with quick_compiles():
        executor = load_executor(spec)
        levels = []
        for step in range(STEPS):
            executor.step(spec.loader.batch(step), step)
            records = {record.name: record for record in executor.timeline.of_step(step)}
            assert {name: record.devices for name, record in records.items()} == {
                name: layout.device_names for name, layout in executor.plan.layouts.items()
            }
            levels.append(live_bytes())
    # The first step compiles: what its programs hold on to is there from the second on.
    assert np.unique([sum(level.values()) for level in levels[1:]]).size == 1, levels
    assert all(level == levels[1] for level in levels[1:])
    assert sum(levels[1].values()) < 1.05 * sum(levels[0].values())
    # What was measured is not nothing: the states of four models, three of them trained or averaged.
    assert sum(levels[0].values()) > 4 * 40_000 * 3
