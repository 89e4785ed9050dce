"""A long run costs the host no more at its end than at its beginning."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from realjax.record.spread import MOST_VALUES, Spread
from tools.bench.long_run import take_steps


@pytest.mark.slow
def test_seconds_and_memory_of_a_step_stay_what_they_are(tmp_path):
    """A stub stands for the program, all else is a run's own. Of 5,000 steps the last quarter against the second."""
    # In a process of its own: what other tests have left is let go of at any time.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        parts, logs = pool.submit(take_steps, tmp_path, 5000).result()
    quarter = len(parts) // 4
    early, late = parts[quarter : 2 * quarter], parts[-quarter:]
    # By the fastest: what else the machine does only makes steps longer.
    assert min(part.step_seconds for part in late) < 1.5 * min(part.step_seconds for part in early)
    assert late[-1].resident_mib < early[0].resident_mib + 10
    events = json.loads((logs / "trace.json").read_text())["traceEvents"]
    assert len(events) < 400
    assert (logs / "report.html").stat().st_size < 2**21


def test_a_spread_keeps_values_from_all_over():
    spread = Spread[int]()
    for value in range(20 * MOST_VALUES):
        spread.add(value)
    assert MOST_VALUES / 2 <= len(spread.values) <= MOST_VALUES
    assert spread.count == 20 * MOST_VALUES
    assert set(np.diff(spread.values)) == {spread.stride}
    assert 20 * MOST_VALUES - spread.values[-1] <= spread.stride
