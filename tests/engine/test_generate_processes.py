from pathlib import Path

import pytest

from tests.given.processes import run_workers

WORKER = Path(__file__).with_name("generate_worker.py")


@pytest.mark.slow
@pytest.mark.e2e
def test_every_process_has_the_tokens_of_layouts_over_both_and_of_the_other(tmp_path):
    assert all("all equal" in text for text in run_workers(WORKER, 2, tmp_path))
