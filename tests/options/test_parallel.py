"""How a call is split: parallel sizes and micro-batches."""

import pytest

from realjax.core.layout import ParallelStrategy
from realjax.dataflow.graph import MicroBatches
from realjax.options.parallel import MFCConfig, ParallelismConfig


def test_strategy_keeps_every_size():
    sizes = ParallelismConfig(
        data_parallel_size=2, pipeline_parallel_size=3, model_parallel_size=5, use_sequence_parallel=True
    )
    assert sizes.strategy() == ParallelStrategy(dp=2, pp=3, tp=5, sequence_parallel=True)


def test_micro_batches_by_count_or_by_tokens_not_both():
    assert MFCConfig(n_mbs=2).micro_batches == MicroBatches(count=2)
    assert MFCConfig(max_tokens_per_mb=4096).micro_batches == MicroBatches(max_tokens=4096)
    with pytest.raises(ValueError, match="max_tokens_per_mb: found 4096 together with n_mbs=2"):
        MFCConfig(n_mbs=2, max_tokens_per_mb=4096)
