"""Call records: made without waiting, in order, and shown as bars and as a trace."""

import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from realjax.record import timeline as module
from realjax.record.timeline import CallRecord, Timeline, measure_calls

FIELDS = {"num_tokens": 10, "num_flops": 1e9, "bytes_moved": 2**20}


def record(name, start, end, step=0, devices="0-3"):
    return CallRecord(step=step, name=name, devices=devices, start=start, end=end, **FIELDS)


def test_watching_does_not_wait_and_reading_does(monkeypatch):
    results, are_ready = [jnp.zeros(i + 1) for i in range(3)], [threading.Event() for _ in range(3)]
    monkeypatch.setattr(module.jax, "block_until_ready", lambda result: are_ready[result.size - 1].wait())
    timeline = Timeline()
    for i, result in enumerate(results):
        timeline.watch(result, start=i * 1e-6, step=0, name=f"call{i}", devices=str(i), **FIELDS)
    for num_done, i in enumerate((2, 0)):
        assert len(timeline.records) == num_done
        are_ready[i].set()
        while len(timeline.records) == num_done:
            time.sleep(0.001)
    threading.Timer(0.05, are_ready[1].set).start()
    records = timeline.of_step(0)
    assert [one.name for one in records] == ["call0", "call1", "call2"]
    assert records[2].end < records[0].end < records[1].end


def test_a_call_begins_when_those_it_waits_for_have_ended():
    timeline = Timeline()
    for name, after in (("first", ()), ("second", ("first",)), ("third", ("first", "second")), ("other", ())):
        timeline.watch(jnp.zeros(1), start=0.0, step=0, name=name, devices="0", after=after, **FIELDS)
    found = {one.name: one for one in timeline.of_step(0)}
    assert found["first"].start == found["other"].start == 0
    for name in ("second", "third"):
        ends = [found[before].end for before in found[name].after]
        assert found[name].start == min(max(ends), found[name].end)
    assert sorted(timeline.list_records(), key=lambda one: one.name) == sorted(found.values(), key=lambda one: one.name)


def test_a_call_lasts_until_its_results_are_there():
    timeline = Timeline()
    start = timeline.now()
    time.sleep(0.02)
    results = jax.jit(lambda x: {"a": x @ x, "b": x})(jnp.ones((64, 64)))
    timeline.watch(results, start=start, step=3, name="call", devices="0", **FIELDS)
    (found,) = timeline.of_step(3)
    assert found.start == start and found.end - start >= 0.02
    assert (found.name, found.num_tokens) == ("call", 10)
    assert timeline.of_step(2) == []


def test_of_a_long_run_the_first_the_last_and_the_slowest_steps_are_kept():
    timeline, num_steps, slow = Timeline(), 2000, {300, 777, 1500}
    for step in range(num_steps):
        timeline.records += [record("gen", step, step + 0.1, step), record("train", step, step + 0.5, step)]
        if step in slow:
            timeline.records.append(record("infer", step, step + 0.9, step))
        assert len(timeline.of_step(step)) == 2 + (step in slow)
    found = [one.step for one in timeline.list_records()]
    kept = set(found)
    assert kept >= {*range(module.NUM_FIRST), *range(num_steps - module.NUM_LAST, num_steps), *slow}
    assert len(kept) == module.NUM_FIRST + module.NUM_SLOWEST + module.NUM_LAST
    assert found == sorted(found)


def test_records_say_what_a_step_took_of_calls_that_ran_once_or_several_times():
    runs = [record("once", 1.0, 3.0), *(record("twice", start, start + 1.0) for start in (1.0, 4.0))]
    of_call = {"time": 2, "tokens_per_second": 5, "tflops": 5e-4, "memory_mib": 0, "moved_mib": 1}
    times = {"tokens_per_second": 10, "tflops": 1e-3, "moved_mib": 2}
    expected = {f"{name}/once": value for name, value in of_call.items()}
    assert measure_calls(runs) == expected | {f"{name}/twice": x for name, x in (of_call | times).items()}


def test_the_trace_has_a_row_for_each_group_of_devices(tmp_path):
    timeline = Timeline()
    timeline.records += [record("gen", 0.5, 1.5, devices="0-3"), record("inf", 0.6, 0.7, step=1, devices="4-7")]
    timeline.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(event["name"], event["tid"], event["args"]["step"]) for event in events] == [
        ("gen", "0-3", 0),
        ("inf", "4-7", 1),
    ]
    np.testing.assert_allclose([(event["ts"], event["dur"]) for event in events], [(5e5, 1e6), (6e5, 1e5)])
    assert {event["ph"] for event in events} == {"X"}


@pytest.mark.parametrize("num_steps", [0, 1, 9])
def test_the_picture_shows_the_last_steps(tmp_path, monkeypatch, num_steps):
    timeline, figures, save = Timeline(), [], Figure.savefig
    for step in range(num_steps):
        timeline.records += [
            record("gen", step, step + 0.5, step, "0-3"),
            record("train", step + 0.5, step + 0.9, step, "0-3"),
            record("inf", step, step + 0.2, step, "4-7"),
        ]
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    timeline.draw(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 0
    (axes,) = figures[0].axes
    shown = min(num_steps, module.MOST_STEPS_DRAWN)
    found = sorted((round(bar.get_x(), 3), round(bar.get_width(), 3)) for bar in axes.patches)
    expected = [(one.start, one.end - one.start) for one in timeline.records[3 * (num_steps - shown) :]]
    np.testing.assert_allclose(found, sorted(expected), atol=1e-3)
    names = ["devices 0-3", "devices 4-7"] if num_steps else []
    assert [label.get_text() for label in axes.get_yticklabels()] == names
