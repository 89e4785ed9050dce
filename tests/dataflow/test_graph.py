"""The graph follows from the keys of its calls."""

import itertools
from dataclasses import replace

import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.generation_config import GenerationConfig
from realjax.core.host_call import HostResult
from realjax.dataflow.graph import DataflowGraph, Generate, Host, Inference, Train, put_ahead

# PPO's calls, listed in the order in which they depend on each other least.
CALLS = (
    Train(
        name="actorTrain",
        role="actor",
        inputs=("tokens", "logprobs", "ref_logprobs", "rewards", "values"),
        loss=SFT_LOSS,
    ),
    Train(name="criticTrain", role="critic", inputs=("tokens", "rewards", "values"), loss=SFT_LOSS),
    Inference(name="criticInf", role="critic", inputs=("tokens",), outputs=("values",), head="values"),
    Inference(name="rewInf", role="reward", inputs=("tokens",), outputs=("rewards",), head="values"),
    Inference(name="refInf", role="ref", inputs=("tokens",), outputs=("ref_logprobs",), head="logprobs"),
    Generate(
        name="actorGen",
        role="actor",
        inputs=("prompts",),
        outputs=("tokens", "logprobs"),
        config=GenerationConfig(),
        eos_ids=(0,),
    ),
)
PPO = DataflowGraph(CALLS, frozenset({"prompts"}))


def call(name: str, inputs: str = "", outputs: str = "", **changes) -> Inference:
    keys = {"inputs": tuple(inputs.split()), "outputs": tuple(outputs.split())}
    return Inference(**{"name": name, "role": name, "head": "values", **keys, **changes})


def train(name: str, inputs: str, role: str) -> Train:
    return Train(name=name, role=role, inputs=tuple(inputs.split()), loss=SFT_LOSS)


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


def test_the_host_waits_for_a_model_when_all_that_can_begin_have_begun():
    """It would wait for the reward model, while devices of the others have nothing to do."""
    rewards = Host(
        name="rewards", fn=lambda arrays, state: HostResult(arrays={}), inputs=("scores",), outputs=("shaped",)
    )
    calls = (call("rew", "x", "scores"), rewards, call("ref", "x", "logprobs"), train("train", "shaped logprobs", "a"))
    names = lambda calls: [one.name for one in DataflowGraph(calls, frozenset({"x"})).order]
    assert names(calls) == ["rew", "ref", "rewards", "train"]
    # One that is carried out beside others begins at once.
    beside = replace(rewards, is_beside=True)
    assert names(tuple(beside if one is rewards else one for one in calls)) == ["rew", "rewards", "ref", "train"]


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
        ([train(n, "x", role="r") for n in "ab"], r"training call of role r appears twice"),
        ([call("a", "x z w")], r"call 'a' reads \['w', 'z'\], which no call writes .* \(it holds \['x'\]\)"),
        ([call("a", "z", "y"), call("b", "y", "z")], r"(a -> b|b -> a) wait for each other"),
        ([call("a", "y", "y")], r"a wait for each other"),
        ([call("a", "x", delays={"x": 1})], r"call 'a' takes 'x' of 1 steps before; that can be an input that a call"),
        ([call("a", "x", "y", delays={"y": 1})], r"call 'a' takes 'y' of 1 steps before"),
        ([call("a", "y", "z", delays={"y": 2}), call("b", "x", "y")], r"call 'a' takes 'y' of 2 steps before"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(calls, message):
    with pytest.raises(ValueError, match=rf"^dataflow graph: .*{message}"):
        DataflowGraph(tuple(calls), frozenset({"x"}))


def test_a_key_of_the_step_before_makes_no_edge_and_no_cycle():
    """Generation for the next step beside training: it reads what the last step's training left."""
    calls = (call("gen", "x weights", "answers", delays={"weights": 1}), call("train", "answers", "weights"))
    graph = DataflowGraph(calls, frozenset({"x"}))
    assert [one.name for one in graph.order] == ["gen", "train"]
    assert list(graph.edges.edges) == [("gen", "train")]


def test_calls_put_ahead_come_last_and_wait_for_nothing_of_their_step():
    score = Host(name="score", fn=lambda arrays, state: HostResult(arrays={}), inputs=("rewards",), outputs=("scores",))
    ahead = ("actorGen", "score", "rewInf", "refInf")
    graph = DataflowGraph(put_ahead((score, *CALLS), ahead, 3), frozenset({"prompts"}))
    names = [one.name for one in graph.order]
    assert graph.ahead == set(ahead) and PPO.ahead == frozenset()
    # Training is on its way before the host waits for answers, and the models judge them before it does.
    assert names == ["criticInf", "actorTrain", "criticTrain", "actorGen", "rewInf", "refInf", "score"]
    assert not any(graph.edges.has_edge(a, b) for a in ahead for b in set(names) - set(ahead))
    (generate,) = [one for one in graph.calls if isinstance(one, Generate)]
    assert generate.num_ahead == 3
    delays = {one.name: set(one.delays) for one in graph.calls if one.delays}
    assert delays["criticTrain"] == {"tokens", "rewards"} and delays["criticInf"] == {"tokens"}
