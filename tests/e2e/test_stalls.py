"""Two processes of which one hangs, or goes another way: the run ends soon, in words, and goes on from its save."""

import re
import time
from pathlib import Path

import pytest

from realjax.core.exit_codes import STALLED
from realjax.runtime.watchdog import STACKS
from tests.e2e.test_processes import assert_same_arrays
from tests.given.commands import Given, Trial
from tests.given.launched import started, wait_for_end, wait_for_text

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
OPTIONS = {
    "allocation_mode": "manual",
    "n_gpus_per_node": 2,
    "allocation.parallel.data_parallel_size": 2,
    "dataset.train_bs_n_seqs": 130,
    "total_train_epochs": 1,
    "save_freq_steps": 1,
    "watchdog_secs": 5,
}
# A launcher whose process 1 does something else first, once: what is put in for `%s`, in which `once()` tells.
ONE_DIFFERS = """
import sys
from realjax.launch import local, restarts
restarts.FIRST_PAUSE_SECONDS = 0.1
program = '''
import os, sys, time
from pathlib import Path
from realjax.apps.quickstart import main
from realjax.data.loader import Loader
from realjax.runtime.executor import Executor
marker = Path(sys.argv.pop(1))
def once():
    is_first = os.environ["REALJAX_PROCESS_ID"] == "1" and not marker.exists()
    return is_first and not marker.touch()
%s
sys.exit(main(["sft", *sys.argv[1:]]))
'''
command = [sys.executable, "-c", program, *sys.argv[1:]]
sys.exit(local.run_processes(command, local.Share(processes=2), restarts.count_retries(sys.argv)))
"""
# The batch of step 4 is made while step 3 runs.
HANGS = """
load = Loader.batch
Loader.batch = lambda self, i: load(self, i if i < 3 or not once() else time.sleep(1e5))
"""
GOES_ELSEWHERE = """
step = Executor.step
def lost(self, batch, i, calls=None):
    if i == 2 and once():
        self.progress.begin("another call", i)
        time.sleep(1e5)
    return step(self, batch, i, calls)
Executor.step = lost
"""


def start(trial: Trial, difference: str, **changes: object) -> list[str]:
    return ["-c", ONE_DIFFERS % difference, str(trial.root / "once"), *trial.words(**changes)]


def test_a_run_that_hangs_is_started_again_and_ends_like_another(given: Given, tmp_path: Path):
    """As one that never hung does in one process; `test_faults.py` compares bits."""
    whole = Trial(given=given, root=tmp_path, name="whole", options=OPTIONS)
    trial, log = Trial(given=given, root=tmp_path, options=OPTIONS), tmp_path / "log"
    assert whole.run() == 0
    with started(start(trial, HANGS, recover_mode="auto"), log) as launcher:
        wait_for_text("(global step 2):", launcher, log)
        stalled = time.monotonic()
        wait_for_text("watchdog ERROR", launcher, log)
        assert time.monotonic() - stalled < 60
        assert wait_for_end(launcher, log) == 0
    text = log.read_text()
    found = (
        r"no progress for \d+ s: process 1 is in batch of step 4 \(for \d+ s\), process 0 waits in results of step 3"
    )
    assert re.search(found, text), text
    assert f"the run ended with code {STALLED}: it is started again" in text
    assert "continuing after step 2" in text
    for i in range(2):
        assert "most recent call first" in (trial.folder("logs") / STACKS / f"process{i}.txt").read_text()
    last = whole.steps()[-1]
    assert trial.steps() == whole.steps()
    assert_same_arrays(trial.state(last), whole.state(last))


def test_processes_in_different_calls_are_found_before_a_bound_is_over(given: Given, tmp_path: Path):
    trial, log = Trial(given=given, root=tmp_path, options=OPTIONS), tmp_path / "log"
    with started(start(trial, GOES_ELSEWHERE, watchdog_secs=600), log) as launcher:
        assert wait_for_end(launcher, log) == STALLED, log.read_text()
    line = "processes are in different calls: process 1 in another call of step 3, process 0 in trainDefault of step 3"
    assert line in log.read_text()
