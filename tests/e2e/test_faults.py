"""A few faults of those of `python -m tests.e2e.faults`: what the tests of processes and of stalls leave out."""

import pytest

from tests.e2e.faults import AHEAD, suffer_all

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_faults_are_told_and_outlived(tmp_path):
    outcomes = suffer_all(tmp_path, ["kill the launcher", "fill the disk"], seed=0)
    assert all(outcome.is_well for outcome in outcomes), "\n".join(map(str, outcomes))


def test_a_run_killed_with_answers_drawn_ahead_ends_like_one_that_was_not(tmp_path):
    """Two of the kills of `--kills`, each at a random moment: no prompt is lost or doubled, and no bit differs."""
    outcomes = suffer_all(tmp_path, ["kill a worker", "kill the launcher"], seed=1, changes=AHEAD)
    assert all(outcome.is_well for outcome in outcomes), "\n".join(map(str, outcomes))
