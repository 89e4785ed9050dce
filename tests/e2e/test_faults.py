"""Some faults of each kind; `python -m tests.e2e.faults` has more of them."""

import pytest

from tests.e2e.faults import KINDS, suffer_all

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_every_fault_is_told_and_outlived(tmp_path):
    outcomes = suffer_all(tmp_path, list(KINDS), seed=0)
    assert all(outcome.is_well for outcome in outcomes), "\n".join(map(str, outcomes))
