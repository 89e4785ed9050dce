"""Where roles live, and which wait in host memory."""

import jax
import pytest

from realjax.allocation.plan import make_plan
from realjax.core.layout import Layout, ParallelStrategy
from realjax.dataflow.graph import MFC, Call, DataflowGraph


def call(name: str, role: str, kind: Call = "inference") -> MFC:
    return MFC(name=name, role=role, call=kind, inputs=("tokens",))


def graph_of(*calls):
    return DataflowGraph(calls, frozenset({"tokens"}))


def on(first, stop, **sizes):
    return Layout(ParallelStrategy(**sizes or {"dp": stop - first}), tuple(jax.devices()[first:stop]))


DPO = graph_of(call("ref_inf", "ref"), call("actor_train", "actor", "train_step"))
LAYOUTS = {"ref_inf": on(0, 8, dp=4, tp=2), "actor_train": on(0, 8, dp=2, tp=4)}


def test_a_trained_role_lives_where_it_is_trained_another_where_it_is_first_called():
    graph = graph_of(
        call("gen", "actor"), call("first", "ref"), call("second", "ref"), call("train", "actor", "train_step")
    )
    layouts = {"gen": on(0, 2), "first": on(2, 4), "second": on(4, 6), "train": on(0, 2, tp=2)}
    plan = make_plan(graph, layouts)
    assert plan.homes == {"actor": layouts["train"], "ref": layouts["first"]}
    assert plan.layouts == layouts


@pytest.mark.parametrize(
    ("ref_layout", "offloaded"),
    [(on(0, 8), {"ref"}), (on(3, 4), {"ref"}), (on(4, 8), set()), (on(4, 6, tp=2), set())],
)
def test_a_role_that_shares_a_device_with_another_waits_in_host_memory(ref_layout, offloaded):
    layouts = {"ref_inf": ref_layout, "actor_train": on(0, 4, tp=4)}
    assert make_plan(DPO, layouts).offloaded == offloaded
    assert make_plan(DPO, layouts, {"ref": None, "actor": None}).offloaded == offloaded
    assert make_plan(DPO, layouts, {"ref": True}).offloaded == {"ref"}
    assert make_plan(DPO, layouts, {"ref": False}).offloaded == set()


def test_a_role_alone_or_trained_stays():
    alone = graph_of(call("one", "ref"), call("two", "ref"))
    assert make_plan(alone, {"one": on(0, 4), "two": on(0, 8)}).offloaded == set()
    both = graph_of(call("a", "actor", "train_step"), call("b", "critic", "train_step"), call("v", "critic"))
    assert make_plan(both, {"a": on(0, 8), "b": on(0, 8), "v": on(0, 4)}).offloaded == set()


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="^allocation: no layout for ref_inf; give each call one"):
        make_plan(DPO, {"actor_train": on(0, 8)})
    with pytest.raises(ValueError, match="^actor.offload: a role that is trained stays on its devices"):
        make_plan(DPO, LAYOUTS, {"actor": True})


def test_the_description_says_where_each_call_runs_and_how_its_parameters_get_there():
    ref, actor = make_plan(DPO, LAYOUTS).describe().splitlines()
    assert ref == "ref_inf      d4p1t2 on 0-7  ref from host memory"
    assert actor == "actor_train  d2p1t4 on 0-7  actor at home"
    graph = graph_of(call("gen", "actor"), call("train", "actor", "train_step"))
    gen, train = make_plan(graph, {"gen": on(0, 4), "train": on(0, 8)}).describe().splitlines()
    assert gen == "gen    d4p1t1 on 0-3  actor from its home d8p1t1 on 0-7"
    assert train.endswith("actor at home")
