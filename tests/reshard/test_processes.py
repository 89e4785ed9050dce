from pathlib import Path

import pytest

from tests.given.processes import run_workers

WORKER = Path(__file__).with_name("process_worker.py")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("num_processes", [2, 4])
def test_layouts_over_and_between_processes_are_bitwise(num_processes, tmp_path):
    assert all("all equal" in text for text in run_workers(WORKER, num_processes, tmp_path))
