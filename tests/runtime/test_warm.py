"""After the first step of a supervised run all its shapes are compiled, and its heads see the learned tokens alone."""

from pathlib import Path

import pytest

from realjax.runtime.warm import compile_shapes
from tests.given.models import quick_compiles
from tests.given.runs import Given, build_spec, load_executor, make_options
from tests.given.texts import write_pairs, write_rows


@pytest.mark.parametrize("experiment", ["sft", "dpo"])
def test_no_step_after_the_first_compiles(experiment: str, given: Given, tmp_path: Path):
    write = write_rows if experiment == "sft" else write_pairs
    data = {"dataset__train_path": write(tmp_path / "data.jsonl", 40, 3), "dataset__max_seqlen": 30}
    spec = build_spec(experiment, make_options(experiment, given, tmp_path, **data, dataset__train_bs_n_seqs=3))
    with quick_compiles():
        executor = load_executor(spec)
        loader = executor.plan.loader
        assert len(loader.shapes.row_counts) > 1
        executor.step(loader.batch(0), 0)
        compile_shapes(executor, loader, range(1, loader.total_steps))
        num_compiled = len(executor.compile_log.entries)
        assert num_compiled == len(loader.shapes.row_counts) * len(spec.graph.calls)
        for step in range(1, loader.total_steps):
            batch = loader.batch(step)
            assert batch["targets"].shape[1] == loader.num_targets < batch.row_len
            executor.step(batch, step)
    assert len(executor.compile_log.entries) == num_compiled
