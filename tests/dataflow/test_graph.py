"""The graph follows from the keys of its calls."""

import itertools

import pytest

from realjax.dataflow.graph import MFC, DataflowGraph

# PPO's calls, listed in the order in which they depend on each other least.
CALLS = (
    MFC(
        name="actorTrain",
        role="actor",
        call="train_step",
        inputs=("tokens", "logprobs", "ref_logprobs", "rewards", "values"),
    ),
    MFC(name="criticTrain", role="critic", call="train_step", inputs=("tokens", "rewards", "values")),
    MFC(name="criticInf", role="critic", call="inference", inputs=("tokens",), outputs=("values",)),
    MFC(name="rewInf", role="reward", call="inference", inputs=("tokens",), outputs=("rewards",)),
    MFC(name="refInf", role="ref", call="inference", inputs=("tokens",), outputs=("ref_logprobs",)),
    MFC(name="actorGen", role="actor", call="generate", inputs=("prompts",), outputs=("tokens", "logprobs")),
)
PPO = DataflowGraph(CALLS, frozenset({"prompts"}))


def call(name: str, inputs: str = "", outputs: str = "", **changes) -> MFC:
    defaults = {"role": name, "call": "inference", "inputs": tuple(inputs.split()), "outputs": tuple(outputs.split())}
    return MFC(name=name, **defaults | changes)


@pytest.mark.parametrize("calls", list(itertools.permutations(CALLS))[::97], ids=lambda calls: calls[0].name)
def test_every_input_exists_before_its_call_however_they_are_listed(calls):
    graph = DataflowGraph(calls, frozenset({"prompts"}))
    made = {"prompts"}
    for mfc in graph.order:
        assert set(mfc.inputs) <= made
        made |= set(mfc.outputs)
    assert sorted(mfc.name for mfc in graph.order) == sorted(mfc.name for mfc in calls)


def test_calls_that_do_not_depend_on_each_other_stay_as_listed():
    inferences = ["criticInf", "rewInf", "refInf"]
    assert [mfc.name for mfc in PPO.order if mfc.name in inferences] == inferences
    loose = tuple(call(name, "prompts") for name in "cab")
    assert [mfc.name for mfc in DataflowGraph(loose, frozenset({"prompts"})).order] == ["c", "a", "b"]


def test_edges_hold_the_keys_that_travel_along_them():
    edges = {(u, v): set(keys) for u, v, keys in PPO.edges.edges(data="keys")}
    assert edges[("actorGen", "actorTrain")] == {"tokens", "logprobs"}
    assert edges[("refInf", "actorTrain")] == {"ref_logprobs"}
    # Every key that a call writes and another reads is on exactly that edge, and no edge holds anything else.
    expected = {
        (writer.name, reader.name, key)
        for writer, reader in itertools.product(CALLS, CALLS)
        for key in set(writer.outputs) & set(reader.inputs)
    }
    assert {(u, v, key) for (u, v), keys in edges.items() for key in keys} == expected


def test_roles_and_their_training_calls():
    assert PPO.roles == ("actor", "critic", "reward", "ref")
    trained = {role: mfc.name for role in PPO.roles if (mfc := PPO.train_call(role))}
    assert trained == {"actor": "actorTrain", "critic": "criticTrain"}


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([call("a", "x"), call("a", "x")], r"call name a appears twice"),
        ([call("a", outputs="y"), call("b", outputs="y")], r"key y appears twice"),
        ([call("a", outputs="x")], r"key x appears twice"),
        ([call(n, "x", role="r", call="train_step") for n in "ab"], r"training call of role r appears twice"),
        ([call("a", "x z w")], r"call 'a' reads \['w', 'z'\], which no call writes .* \(it holds \['x'\]\)"),
        ([call("a", "z", "y"), call("b", "y", "z")], r"(a -> b|b -> a) wait for each other"),
        ([call("a", "y", "y")], r"a wait for each other"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(calls, message):
    with pytest.raises(ValueError, match=rf"^dataflow graph: .*{message}"):
        DataflowGraph(tuple(calls), frozenset({"x"}))
