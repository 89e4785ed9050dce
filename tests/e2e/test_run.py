"""What a run does besides training: it compiles once, and it stops when numbers are no longer finite."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.given.checkpoints import write_llama
from tests.given.commands import Given, Trial
from tests.given.compare import find_differing

OPTIONS = {
    "allocation_mode": "manual",
    "n_gpus_per_node": 2,
    "allocation.parallel.data_parallel_size": 2,
    "dataset.train_bs_n_seqs": 130,
}


@pytest.fixture
def trial(given: Given, tmp_path: Path) -> Trial:
    return Trial(given=given, root=tmp_path, options=OPTIONS)


@pytest.mark.slow
def test_a_second_epoch_compiles_nothing(trial, capsys):
    compiled = {}
    for epochs in (1, 2):
        # 520 rows are 5.8 batches: one straddles the epochs, and the last of both runs is smaller.
        changes = {"dataset__train_bs_n_seqs": 90, "dataset__valid_bs_n_seqs": 16, "eval_freq_epochs": 1}
        assert trial.run(dataset__valid_path=trial.given.valid, total_train_epochs=epochs, **changes) == 0
        output = capsys.readouterr().out
        compiled[epochs] = re.findall(r"compiled (\w+) for rows (\S+ \S+) in", output)
        assert f"programs compiled: {len(compiled[epochs])} in" in output
        assert trial.steps()[-1] == {1: 6, 2: 12}[epochs]
    # The last held-out batch is half as large as the others, which is worth a shape of its own.
    assert [name for name, _ in compiled[1]] == ["evaluate", "evaluate", "trainDefault"]
    assert [name for name, _ in compiled[2]] == ["evaluate", "evaluate", "trainDefault"]


@pytest.mark.slow
def test_a_diverging_run_stops_and_keeps_its_last_finite_state(trial):
    changes = {"model__optimizer__lr": 1e30, "max_nonfinite_steps": 3, "save_freq_steps": 1, "total_train_epochs": 4}
    message = "step 4: gradients were not finite 3 times in a row .*; step 3 is in .*; lower the learning rate"
    with pytest.raises(RuntimeError, match=message):
        trial.run(**changes)
    assert trial.steps() == [1, 2, 3]
    assert [record["num_skipped"] for record in trial.metrics()] == [0, 1, 2]
    # The first update was the last good one; the steps after it changed nothing but the counter.
    first, last = trial.weights(1), trial.state(3)
    assert not find_differing(trial.weights(3), first)
    assert all(np.isfinite(array).all() for array in last.values())
    assert (int(last["['num_updates']"]), int(last["['num_skipped']"])) == (3, 2)


def test_poisoned_weights_stop_the_run(trial, tmp_path, capsys):
    # Large, not nan: those are refused before.
    model = write_llama(tmp_path / "poisoned", poison=3e38)
    with pytest.raises(RuntimeError, match="not finite 2 times in a row .*; nothing was saved before; lower"):
        trial.run(model__path=model, max_nonfinite_steps=2)
    assert "step 1: gradients are not finite, the update was skipped (1 in a row)" in capsys.readouterr().out
