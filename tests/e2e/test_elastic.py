"""A run that goes on on fewer and on more devices and processes: the numbers of one that stays where it is."""

import re
from dataclasses import replace

import pytest

from tests.e2e.test_processes import launch_words, started
from tests.given.commands import Trial
from tests.given.processes import HANG_SECONDS

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("quick")]
MACHINES = ((2, 4), (1, 4), (2, 2))  # processes, devices of each
# Nobody has fixed a layout: it follows the devices, here by their number, and there by rule.
OPTIONS = {
    "sft": {"allocation_mode": None, "dataset.train_bs_n_seqs": 130},
    "ppo": {"allocation_mode": "heuristic", "dataset.train_bs_n_seqs": 16},
}


@pytest.mark.parametrize("experiment", OPTIONS)
def test_a_run_goes_on_wherever_there_are_devices(experiment, given, tmp_path):
    options = {"n_gpus_per_node": None, "recover_mode": "auto", "total_train_epochs": 3} | OPTIONS[experiment]
    trial = Trial(given=given, root=tmp_path, name="moved", experiment=experiment, options=options)
    log = tmp_path / "moved.log"
    for epoch, (num_processes, num_devices) in enumerate(MACHINES, start=1):
        words = trial.words(total_train_epochs=epoch, lr_schedule_epochs=3)
        flags = ["-m", "launch.local", "--processes", str(num_processes), "--devices", str(num_devices)]
        with started([*flags, "--", experiment, *words], log) as process:
            assert process.wait(HANG_SECONDS) == 0, log.read_text()
    moves = re.findall(r"the run moves: (\d+ -> \d+) devices, (\d+ -> \d+) processes, .*; its batches", log.read_text())
    assert moves == [("8 -> 4", "2 -> 1")] and "the run moves: 4 devices, 1 -> 2 processes" in log.read_text()
    stays = replace(trial, name="stays")
    with started(launch_words(stays.words(), "--devices", "4", experiment=experiment), tmp_path / "stays.log") as one:
        assert one.wait(HANG_SECONDS) == 0, (tmp_path / "stays.log").read_text()
    assert trial.steps() == stays.steps() and len(stays.steps()) >= 6
    losses = [
        [{name: x for name, x in record.items() if "loss" in name} for record in run.metrics("train")]
        for run in (trial, stays)
    ]
    for ours, theirs in zip(*losses):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5) and ours
