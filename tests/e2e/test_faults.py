"""Two faults of those of `python -m tests.e2e.faults`: what the tests of processes and of stalls leave out."""

import pytest

from tests.e2e.faults import suffer_all

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_faults_are_told_and_outlived(tmp_path):
    outcomes = suffer_all(tmp_path, ["kill the launcher", "fill the disk"], seed=0)
    assert all(outcome.is_well for outcome in outcomes), "\n".join(map(str, outcomes))
