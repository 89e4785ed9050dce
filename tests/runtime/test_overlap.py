"""Calls on disjoint devices run at the same time, and give what they give one after the other."""

import json
from pathlib import Path

import pytest

from tests.given.processes import run_workers

WORKER = Path(__file__).with_name("overlap_worker.py")


@pytest.mark.slow
@pytest.mark.e2e
def test_calls_on_disjoint_devices_of_two_processes_overlap(tmp_path):
    alone, apart = (json.loads(run_workers(WORKER, n, tmp_path)[0].splitlines()[-1]) for n in (1, 2))
    for ours, theirs in zip(apart, alone, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    # The first step compiles, in each process as long as it takes.
    for step in apart[1:]:
        (long_start, long_end), (short_start, short_end) = step["times"]["long"], step["times"]["short"]
        assert max(long_start, short_start) < min(long_end, short_end)
        # Made second, done first: one after the other it would end last.
        assert short_end < long_end
