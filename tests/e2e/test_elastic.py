"""A run that goes on on more and on fewer devices and processes: the numbers of one that stays where it is."""

import re
from dataclasses import replace

import pytest

from tests.e2e.test_processes import launch_words, started
from tests.given.commands import Trial
from tests.given.processes import HANG_SECONDS

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("quick")]
# Nobody has fixed a layout: it follows the devices, here by their number, and there by rule.
OPTIONS = {
    "sft": {"allocation_mode": None, "dataset.train_bs_n_seqs": 130},
    "ppo": {"allocation_mode": "heuristic", "dataset.train_bs_n_seqs": 16, "algo.ppo_n_minibatches": 1},
}


@pytest.mark.parametrize("experiment", OPTIONS)
def test_a_run_goes_on_wherever_there_are_devices(experiment, given, tmp_path):
    """An epoch on two processes of two devices, one on this process's eight, and one on two processes of one."""
    options = {"n_gpus_per_node": None, "recover_mode": "auto", "total_train_epochs": 3} | OPTIONS[experiment]
    trial = Trial(given=given, root=tmp_path, name="moved", experiment=experiment, options=options)
    for epoch, num_devices in enumerate((2, None, 1), start=1):
        changes, log = {"total_train_epochs": epoch, "lr_schedule_epochs": 3}, tmp_path / f"{epoch}.log"
        if num_devices is None:
            assert trial.run(**changes) == 0
            continue
        words = launch_words(trial.words(**changes), "--devices", str(num_devices), experiment=experiment)
        with started(words, log) as process:
            assert process.wait(HANG_SECONDS) == 0, log.read_text()
    moves = re.findall(
        r"the run moves: (\d+ -> \d+) devices, (\d+ -> \d+) processes, .*; its batches",
        (trial.folder("logs") / "run.log").read_text(),
    )
    assert moves == [("4 -> 8", "2 -> 1"), ("8 -> 2", "1 -> 2")]
    stays = replace(trial, name="stays")
    assert stays.run() == 0
    assert trial.steps() == stays.steps() and len(stays.steps()) >= 6
    losses = [
        [{name: x for name, x in record.items() if "loss" in name} for record in run.metrics("train")]
        for run in (trial, stays)
    ]
    for ours, theirs in zip(*losses):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5) and ours
