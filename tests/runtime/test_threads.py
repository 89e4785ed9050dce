"""Calls in threads: each ends as a result or a failure, and one that hangs holds nothing up."""

import threading
import time

from realjax.runtime.threads import Failed, TimedCalls


def take_all(calls: TimedCalls, count: int) -> dict[int, object]:
    found: dict[int, object] = {}
    while len(found) < count:
        found |= dict(calls.take(5.0))
    return found


def test_every_call_ends_as_a_result_or_a_failure():
    calls, stuck = TimedCalls(num_threads=2, seconds=0.2), threading.Event()

    def leave():
        raise SystemExit(3)

    calls.start(0, stuck.wait)
    calls.start(1, lambda: "one")
    calls.start(2, lambda: 1 / 0)
    calls.start(3, leave)
    calls.start(4, lambda: None)
    assert len(calls) == 5
    found = take_all(calls, 5)
    assert found[1] == "one" and found[4] is None
    assert found[0] == Failed("it took longer than 0.2 seconds")
    assert "ZeroDivisionError" in found[2].reason and "SystemExit" in found[3].reason
    stuck.set()
    assert not len(calls) and calls.take(0.05) == []  # what comes too late is not heard


def test_calls_wait_for_a_thread_and_their_time_begins_then():
    calls, running, most = TimedCalls(num_threads=3, seconds=5.0), [], []

    def count():
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()

    for number in range(12):
        calls.start(number, count)
    assert set(take_all(calls, 12)) == set(range(12)) and max(most) <= 3


def test_nothing_to_wait_for_takes_no_time():
    start = time.monotonic()
    assert TimedCalls(num_threads=1, seconds=9.0).take(3.0) == [] and time.monotonic() - start < 1


def test_spans_are_when_calls_were_under_way():
    clock = iter([0.0, 1.0, 1.02, 3.0, 9.0, 10.0])  # each call begins and ends in turn
    calls = TimedCalls(num_threads=1, seconds=9.0, now_fn=lambda: next(clock))
    for number in range(3):
        calls.start(number, lambda: None)
        assert calls.take(5.0) == [(number, None)]
    assert calls.take_spans() == [(0.0, 3.0), (9.0, 10.0)] and not calls.take_spans()
