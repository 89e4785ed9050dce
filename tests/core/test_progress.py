"""Marks of a process's progress, and the bounds that follow from what it has measured."""

import pytest

from realjax.core import progress
from realjax.core.progress import NUM_RECENT, Progress


class Clock:
    """Stands in for `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_marks_are_numbered_and_the_last_ones_kept(clock):
    found = Progress()
    for step in range(50):
        found.begin("train", step)
    assert (found.mark.number, str(found.mark)) == (50, "train of step 50")
    assert [mark.number for mark in found.recent] == list(range(51 - NUM_RECENT, 51))


def test_bounds_follow_what_was_measured(clock):
    found = Progress()
    assert found.bound_seconds(60) == 12 * 60  # never done before, and of no step
    found.begin("train", 0)
    clock.now += 30
    found.begin("results", 0)
    assert found.bound_seconds(60) == 6 * 60
    found.begin("train", 1)
    assert found.bound_seconds(60) == 10 * 30
    assert found.bound_seconds(1000) == 1000


def test_compiling_has_a_bound_of_its_own_and_counts_for_no_call(clock):
    found = Progress()
    found.begin("train", 0)
    with found.compile("train"):
        assert found.compiling == "train" and found.bound_seconds(60) == 12 * 60
        clock.now += 100
    clock.now += 1
    found.begin("results", 0)
    assert found.longest["train"] == 1 and found.longest_compile == 100
    with found.compile("train"):
        assert found.bound_seconds(60) == 10 * 100
        assert found.bound_seconds(60, 1001) == 1001
    assert found.compiling is None and found.num_compiles == 4


def test_a_program_may_compile_as_long_after_one_that_was_quick(clock):
    found = Progress()
    found.begin("generate", 0)
    with found.compile("generate"):
        clock.now += 0.5  # from the cache
    found.begin("train", 0)
    with found.compile("train"):
        assert found.bound_seconds(60) == 12 * 60 and found.bound_seconds(60, 7200) == 7200
    assert found.bound_seconds(60, 7200) == 6 * 60
