"""Steps played through: what waits for what, what is held where."""

import random
from dataclasses import replace

import jax
import pytest

from realjax.allocation.candidates import list_choices
from realjax.allocation.choice import Choice
from realjax.allocation.prediction import HEAD
from realjax.allocation.run_workload import read_workload
from realjax.allocation.simulate import USABLE_SHARE, Simulator, simulate
from realjax.allocation.workload import Workload
from realjax.core.layout import ParallelStrategy
from tests.given.costs import GivenCosts, RandomCosts
from tests.given.runs import build_rl_spec, make_plan
from tests.given.workloads import make_call, make_cluster, make_ppo, make_role, make_shape

CLUSTER = make_cluster()
SECONDS = {"gen": 4.0, "ref": 3.0, "rew": 2.0, "train": 5.0}
ACTOR = make_role("actor", make_shape(), is_trained=True)
REF, REW = make_role("ref", make_shape()), make_role("rew", make_shape())


def on(first: int, stop: int, **sizes) -> Choice:
    strategy = ParallelStrategy(**sizes or {"dp": stop - first})
    return Choice(strategy=strategy, devices=tuple(range(first, stop)))


def make_step(num_sequences: int = 240, **roles) -> Workload:
    """Returns gen, then ref and rew, then train; `roles` replace those of their names."""
    own, made = {"actor": ACTOR, "ref": REF, "rew": REW, **roles}, {"num_sequences": num_sequences}
    calls = (
        make_call("gen", "generate", own["actor"], **made),
        make_call("ref", "inference", own["ref"], after=("gen",), **made),
        make_call("rew", "inference", own["rew"], after=("gen",), **made),
        make_call("train", "train", own["actor"], after=("gen", "ref", "rew"), **made),
    )
    return Workload(calls=calls, roles=own)


def times(workload: Workload, costs: GivenCosts, **choices: Choice) -> dict[str, tuple[float, float]]:
    predicted = simulate(workload, choices, costs, CLUSTER)
    assert predicted.seconds == max(call.end for call in predicted.calls)
    return {call.name: (call.start, call.end) for call in predicted.calls}


def test_calls_on_disjoint_devices_overlap():
    found = times(make_step(), GivenCosts(calls=SECONDS), gen=on(0, 8), ref=on(0, 4), rew=on(4, 8), train=on(0, 8))
    assert found == {"gen": (0, 4), "ref": (4, 7), "rew": (4, 6), "train": (7, 12)}


def test_calls_that_share_a_device_take_turns_in_the_order_of_dispatch():
    found = times(make_step(), GivenCosts(calls=SECONDS), gen=on(0, 8), ref=on(0, 4), rew=on(2, 8), train=on(0, 8))
    assert found == {"gen": (0, 4), "ref": (4, 7), "rew": (7, 9), "train": (9, 14)}


def test_a_call_waits_for_its_inputs_alone():
    """Rew is dispatched after ref and needs the generated answers only; its devices are not ref's."""
    found = times(make_step(), GivenCosts(calls=SECONDS), gen=on(0, 4), ref=on(0, 4), rew=on(4, 8), train=on(4, 8))
    assert found["rew"] == (4, 6) and found["train"] == (7, 12)


def test_a_copy_of_the_parameters_keeps_both_sides_busy():
    """The move of ref's second call, from devices 0-1 to 6-7, waits for both and delays rew on its home."""
    work = make_step()
    again = make_call("again", "inference", REF, after=("gen",), num_sequences=240)
    work = replace(work, calls=(*work.calls[:2], again, *work.calls[2:]))
    costs = GivenCosts(calls={**SECONDS, "again": 1.0}, moves={"ref": 0.5, "actor": 2.0})
    choices = {"gen": on(0, 8), "ref": on(0, 2), "again": on(6, 8), "rew": on(0, 2), "train": on(0, 8)}
    predicted = simulate(
        replace(work, roles={**work.roles, "ref": replace(REF, offload=False)}), choices, costs, CLUSTER
    )
    calls = {call.name: call for call in predicted.calls}
    assert (calls["gen"].start, calls["gen"].source) == (0.0, "home")  # the layout of train
    assert [(calls[name].start, calls[name].end) for name in ("ref", "again")] == [(4, 7), (7.5, 8.5)]
    assert (calls["again"].source, calls["again"].moved_bytes, calls["again"].move_seconds) == ("moved", 10.0, 0.5)
    assert calls["rew"].start == 7.5
    (move,) = [span for span in predicted.spans if span.what == "move"]
    assert (move.name, move.devices, move.start, move.end) == ("again", (0, 1, 6, 7), 7.0, 7.5)
    assert predicted.moved_bytes == 15.0  # rew waits in host memory
    other = simulate(work, {**choices, "gen": on(0, 8, tp=8)}, costs, CLUSTER)
    assert (other.calls[0].start, other.calls[0].source) == (2.0, "moved")


def test_parameters_in_host_memory_are_fetched_for_every_call():
    costs = GivenCosts(calls=SECONDS, fetches={"ref": 1.0, "rew": 0.5})
    choices = {"gen": on(0, 4), "ref": on(4, 6), "rew": on(0, 4), "train": on(0, 4)}
    predicted = simulate(make_step(), choices, costs, CLUSTER)
    assert predicted.offloaded == {"rew"}  # it shares devices with the actor, ref does not
    assert {call.name: (call.source, call.start) for call in predicted.calls} == {
        "gen": ("home", 0.0),
        "ref": ("home", 4.0),
        "rew": ("host", 4.5),
        "train": ("home", 7.0),
    }
    step = make_step(ref=replace(REF, offload=True), rew=replace(REW, offload=False))
    assert simulate(step, choices, costs, CLUSTER).offloaded == {"ref"}


def test_the_host_waits_for_answers_before_it_dispatches_more():
    """Even what needs none of them, on other devices."""
    step = make_step()
    step = replace(step, calls=(step.calls[0], replace(step.calls[1], after=()), *step.calls[2:]))
    found = times(step, GivenCosts(calls=SECONDS), gen=on(0, 4), ref=on(4, 8), rew=on(4, 8), train=on(0, 4))
    assert found["ref"] == (4, 7)


def test_parameters_that_were_trained_in_the_step_are_waited_for():
    calls = (make_call("train", "train", ACTOR), make_call("score", "inference", ACTOR))
    step = Workload(calls=calls, roles={"actor": ACTOR})
    costs = GivenCosts(calls={"train": 5.0, "score": 1.0}, moves={"actor": 0.5})
    assert times(step, costs, train=on(0, 4), score=on(4, 8))["score"] == (5.5, 6.5)


def test_stages_of_one_call_are_empty_layers_of_the_others():
    """Five layers: two stages have three each, three have two each, so both calls run six."""
    role = make_role("actor", make_shape(num_layers=5), is_trained=True)
    made = {"num_sequences": 240}
    calls = (make_call("first", "inference", role, **made), make_call("train", "train", role, **made))
    step = Workload(calls=calls, roles={"actor": role})
    costs = GivenCosts(calls={"first": 5.0, "train": 6.0}, home={"actor": 10.0}, held={"first": 5.0})
    choices = {"first": on(0, 1), "train": on(0, 3, pp=3)}
    predicted = simulate(step, choices, costs, CLUSTER)
    assert [call.seconds for call in predicted.calls] == pytest.approx([5.0 * 6 / 5, 6.0])
    assert predicted.calls[0].peak_bytes == pytest.approx(10.0 + 5.0 * 6 / 5)


def test_rows_are_shared_by_the_calls_that_read_them():
    """Eight sequences, each in a row: 8 rows divide over four devices, 9 over three, and 12 over both."""
    costs = GivenCosts(calls={"gen": 1.0, "ref": 8.0, "rew": 9.0, "train": 8.0})
    choices = {"gen": on(0, 1), "ref": on(0, 4), "rew": on(4, 7), "train": on(0, 4)}
    step = make_step(num_sequences=8)
    found = {call.name: call.seconds for call in simulate(step, choices, costs, CLUSTER).calls}
    # Answers have no rows yet, and updates get rows of their own.
    assert found == pytest.approx({"gen": 1.0, "ref": 12.0, "rew": 12.0, "train": 8.0})
    scored = Workload(calls=tuple(replace(call, after=()) for call in step.calls[1:]), roles=step.roles)
    found = simulate(scored, choices, costs, CLUSTER)
    assert {call.name: call.seconds for call in found.calls} == pytest.approx({"ref": 12.0, "rew": 12.0, "train": 12.0})


def make_ahead() -> Workload:
    """Returns train, then what works for the next step: gen, ref and rew."""
    step = make_step()
    calls = {call.name: replace(call, is_ahead=call.name != "train") for call in step.calls}
    train = replace(calls["train"], after=())
    return replace(step, calls=(train, calls["gen"], calls["ref"], calls["rew"]))


def test_what_works_for_the_next_step_runs_beside_training():
    """The copy of the parameters comes first, and neither side waits for the other after that."""
    costs = GivenCosts(calls=SECONDS, moves={"actor": 0.5})
    found = times(make_ahead(), costs, gen=on(0, 4), ref=on(0, 4), rew=on(0, 4), train=on(4, 8))
    assert found == {"gen": (0.5, 4.5), "ref": (4.5, 7.5), "rew": (7.5, 9.5), "train": (0.5, 5.5)}
    # On the same devices one comes after the other, and a copy is needed where it else is not.
    costs = GivenCosts(calls={"gen": 4.0, "train": 5.0}, held={"gen": 3.0})
    found = times(make_ahead(), costs, gen=on(0, 8), ref=on(0, 8), rew=on(0, 8), train=on(0, 8))
    assert found["train"] == (0, 5) and found["gen"] == (5, 9)


def make_random_plan(seed: int) -> tuple[Workload, dict[str, Choice], RandomCosts]:
    rng, cluster = random.Random(seed), make_cluster()
    work = make_ppo(0, 0, num_sequences=16)
    costs = RandomCosts(seed=seed, memory=float(cluster.memory_bytes))
    choices = {call.name: rng.choice(list_choices(call, work.roles[call.role], cluster)) for call in work.calls}
    return work, choices, costs


@pytest.mark.parametrize("seed", range(20))
def test_every_device_does_one_thing_at_a_time_and_nothing_starts_later_than_it_must(seed):
    """Said again device by device, as a machine would have it."""
    work, choices, costs = make_random_plan(seed)
    predicted = simulate(work, choices, costs, CLUSTER)
    free, ended, host = [0.0] * 8, dict[str, float](), 0.0
    for span in predicted.spans:
        call = next(call for call in work.calls if call.name == span.name)
        ready = [ended[name] for name in call.after] if span.what == "call" else []
        assert span.start == max([host, *ready, *(free[device] for device in span.devices)])
        for device in span.devices:
            free[device] = span.end
        if span.what == "call":
            ended[span.name] = span.end
            host = span.end if call.kind == "generate" else host
            assert span.devices == choices[span.name].devices
    assert set(ended) == set(choices) and predicted.seconds == max(free)


@pytest.mark.parametrize("seed", range(20))
def test_a_device_holds_its_homes_and_the_largest_of_its_calls(seed):
    work, choices, costs = make_random_plan(seed)
    predicted = simulate(work, choices, costs, CLUSTER)
    sources = {call.name: call.source for call in predicted.calls}
    for device in range(8):
        held, most = 0.0, 0.0
        for name, role in work.roles.items():
            home = work.home_call(name)
            if device in choices[home.name].devices and name not in predicted.offloaded:
                held += costs.home_bytes(role, home, choices[home.name])
        for call in work.calls:
            if device in choices[call.name].devices:
                role, at_home = work.roles[call.role], sources[call.name] == "home"
                most = max(most, costs.call_bytes(role, call, choices[call.name], at_home=at_home))
        assert predicted.device_bytes[device] == pytest.approx(held + most)
    on_calls = [device for choice in choices.values() for device in choice.devices]
    most = max(predicted.device_bytes[device] for device in on_calls)
    assert max(call.peak_bytes for call in predicted.calls) == pytest.approx(most)
    assert predicted.fits == (max(predicted.device_bytes) <= CLUSTER.memory_bytes * USABLE_SHARE)


@pytest.mark.parametrize("seed", range(20))
def test_a_score_is_a_prediction_in_short(seed):
    work, choices, costs = make_random_plan(seed)
    simulator = Simulator(work, costs, CLUSTER)
    plan = [simulator.price(call, choices[call.name]) for call in work.calls]
    score, predicted = simulator.score(plan), simulator.predict(plan)
    assert score.seconds == predicted.seconds and (score.excess_bytes == 0) == predicted.fits
    assert all(len(row) == len(HEAD) for row in predicted.rows())


@pytest.mark.parametrize("options", [{}, {"allocation_mode": "heuristic", "n_gpus_per_node": 4}])
def test_roles_wait_in_host_memory_where_those_of_the_run_do(given, tmp_path, options):
    spec = build_rl_spec(given, tmp_path, **options)
    plan, work = make_plan(spec), read_workload(spec, "cpu")
    numbers = {device: i for i, device in enumerate(jax.devices())}
    choices = {
        call.name: Choice(
            strategy=plan.layouts[call.name].strategy,
            devices=tuple(numbers[device] for device in plan.layouts[call.name].devices),
        )
        for call in work.calls
    }
    predicted = simulate(work, choices, GivenCosts(), CLUSTER)
    assert predicted.offloaded == plan.offloaded
    layouts = plan.layouts
    for call in predicted.calls:
        at_home = call.role not in plan.offloaded and layouts[call.name] == plan.homes[call.role]
        assert (call.source == "home") == at_home


def test_a_trained_role_in_host_memory_is_refused():
    with pytest.raises(ValueError, match="actor.offload: a role that is trained stays"):
        Simulator(make_step(actor=replace(ACTOR, offload=True)), GivenCosts(), CLUSTER)


def test_a_call_without_a_choice_is_refused():
    with pytest.raises(ValueError, match="no choice for rew, train"):
        simulate(make_step(), {"gen": on(0, 8), "ref": on(0, 8)}, GivenCosts(), CLUSTER)
