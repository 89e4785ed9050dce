"""A host call that runs beside others does not hold them up, and its keys are there for those that need them."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from realjax.core.host_call import HostResult
from realjax.core.metrics import Total
from realjax.dataflow.graph import DataflowGraph, Host
from realjax.runtime.executor import Executor
from tests.given.sequences import make_examples, make_loader, pack_in_order
from tests.given.specs import make_paths, make_spec

BATCH, _ = pack_in_order(make_examples([5, 9]), 10, num_rows=2)
WAIT = 60  # seconds after which something hangs


def make(**fns: Any) -> Executor:
    """Returns what runs slow -> late, and other, which needs neither."""
    host = lambda name, inputs, outputs: Host(
        name=name, fn=fns[name], inputs=inputs, outputs=outputs, is_beside=name == "slow", state={"calls": 0.0}
    )
    calls = (
        host("slow", ("loss_mask",), ("rewards",)),
        host("late", ("rewards",), ("scores",)),
        host("other", ("loss_mask",), ("values",)),
    )
    graph, loader = DataflowGraph(calls, frozenset({"tokens", "loss_mask"})), make_loader(batch_size=12)
    plan: Any = SimpleNamespace()  # no call is on a device
    return Executor(make_spec(make_paths(Path("nowhere")), graph=graph, roles={}, loader=loader), plan, {}, {})


def test_others_go_on_and_who_needs_its_keys_waits():
    went_on, seen = threading.Event(), []

    def slow(arrays, state):
        assert threading.current_thread() is not threading.main_thread()
        assert went_on.wait(WAIT), "the other call waits for this one"
        time.sleep(0.05)
        calls = state["calls"] + 1
        return HostResult(
            arrays={"rewards": np.full((2, 1), calls)}, state={"calls": calls}, metrics={"called": Total(calls)}
        )

    def other(arrays, state):
        went_on.set()
        return HostResult(arrays={"values": np.zeros((2, 10))})

    def late(arrays, state):
        seen.append(float(arrays["rewards"][0, 0]))
        return HostResult(arrays={"scores": np.zeros((2, 10))})

    executor = make(slow=slow, other=other, late=late)
    assert [call.name for call in executor.graph.order] == ["slow", "other", "late"]
    for step in range(2):
        went_on.clear()
        result = executor.step(BATCH, step)
        assert {"rewards", "scores", "values"} <= set(result.batch)
        assert result.metrics["slow"][0]["called"] == Total(step + 1.0)
        (record,) = executor.timeline.of_step(step)
        assert record.name == "slow" and record.devices == "host" and 0.05 < record.end - record.start < WAIT
    went_on.clear()
    executor.step(BATCH, None)  # an evaluation leaves no trace
    assert seen == [1.0, 2.0, 3.0] and executor.controls["slow"] == {"calls": 2.0}
    assert not executor.timeline.of_step(2)


def test_one_may_wait_for_another():
    read = lambda arrays, state: HostResult(arrays={"scores": np.full((2, 10), arrays["rewards"][0, 0])})
    write = lambda arrays, state: HostResult(arrays={"rewards": np.full((2, 1), 3.0)})
    nothing = lambda arrays, state: HostResult(arrays={"values": np.zeros((2, 10))})
    executor = make(slow=write, other=nothing, late=read)
    calls = [replace(call, is_beside=True) if isinstance(call, Host) else call for call in executor.graph.order]
    batch = executor.step(BATCH, 0, calls).batch
    assert (batch["scores"] == 3).all() and "values" in batch


@pytest.mark.parametrize("error", [ValueError("reward.fn: no"), SystemExit(0)], ids=["error", "exit"])
def test_its_error_is_raised_where_it_is_waited_for(error):
    def slow(arrays, state):
        raise error

    nothing = lambda arrays, state: HostResult(arrays={"values": np.zeros((2, 10))})
    executor = make(slow=slow, other=nothing, late=nothing)
    with pytest.raises(type(error)) as caught:
        executor.step(BATCH, 0)
    assert caught.value is error
