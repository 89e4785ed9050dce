"""The plan that search finds, against all others."""

import itertools
import random
import time
from dataclasses import replace

import pytest

from realjax.allocation.candidates import list_choices
from realjax.allocation.cluster import Cluster, find_cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.heuristic import Placement
from realjax.allocation.search import Limits, list_single_layouts, place_choices, search
from realjax.allocation.simulate import Simulator
from realjax.allocation.workload import Fixed, Kind, Workload
from realjax.core.layout import ParallelStrategy
from tests.given.costs import GivenCosts, RandomCosts
from tests.given.workloads import make_call, make_cluster, make_ppo, make_role, make_shape

KINDS: tuple[Kind, ...] = ("generate", "inference", "train")
MOST_PLANS = 4000  # of a case that is gone through whole


def make_case(seed: int) -> tuple:
    """Returns a random small step with a random cluster, candidates and costs."""
    rng = random.Random(seed)
    cluster = make_cluster(*rng.choice([(1, 2), (1, 4), (2, 2), (1, 8), (2, 4)]))
    num_calls = rng.randint(2, 4)
    names = [rng.choice("abc") for _ in range(num_calls)]
    kinds: list[Kind] = [rng.choice(KINDS) for _ in range(num_calls)]
    trained = {name: [i for i in range(num_calls) if names[i] == name and kinds[i] == "train"] for name in names}
    for numbers in trained.values():
        for i in numbers[1:]:
            kinds[i] = "inference"  # one training call of a role
    roles = {
        name: make_role(
            name,
            make_shape(num_layers=rng.choice([4, 5])),
            is_trained=bool(trained[name]),
            offload=None if trained[name] else rng.choice([None, None, True, False]),
        )
        for name in names
    }
    calls = tuple(
        make_call(
            f"call{i}",
            kinds[i],
            roles[names[i]],
            num_sequences=16,
            after=tuple(f"call{j}" for j in range(i) if rng.random() < 0.4),
        )
        for i in range(num_calls)
    )
    workload = Workload(calls=calls, roles=roles)
    most = int(MOST_PLANS ** (1 / num_calls))
    candidates = {}
    for call in calls:
        choices = list_choices(call, roles[call.role], cluster)
        candidates[call.name] = rng.sample(choices, min(most, len(choices)))
    costs = RandomCosts(seed=seed, memory=float(cluster.memory_bytes), crowding=rng.choice([0.1, 0.2, 0.3]))
    return workload, cluster, candidates, costs


def go_through(workload, cluster, candidates, costs):
    """Returns the seconds of the fastest plan that fits, None where none does."""
    simulator = Simulator(workload, costs, cluster)
    priced = [[simulator.price(call, choice) for choice in candidates[call.name]] for call in workload.calls]
    best = min(simulator.score(plan) for plan in itertools.product(*priced))
    return best.seconds if best.excess_bytes == 0 else None


def make_predicted_case(seed: int) -> tuple:
    """Returns a random small step of larger models on H100s, with the costs of the planner."""
    workload, cluster, _, _ = make_case(seed)
    rng = random.Random(seed)
    cluster = replace(
        find_cluster("h100"),
        num_nodes=cluster.num_nodes,
        devices_per_node=cluster.devices_per_node,
        memory_bytes=rng.choice([30, 45, 80]) * 2**30,
    )
    shape = make_shape(7, num_layers=rng.choice([8, 9]))
    roles = {name: replace(role, model=shape) for name, role in workload.roles.items()}
    calls = tuple(replace(call, model=shape, num_sequences=32) for call in workload.calls)
    most = int(MOST_PLANS ** (1 / len(calls)))
    candidates = {}
    for call in calls:
        choices = list_choices(call, roles[call.role], cluster)
        candidates[call.name] = rng.sample(choices, min(most, len(choices)))
    return Workload(calls=calls, roles=roles), cluster, candidates, ClusterCosts(cluster=cluster)


@pytest.mark.parametrize("make", [make_case, make_predicted_case])
@pytest.mark.parametrize("seed", range(40))
def test_no_plan_of_a_small_case_is_faster(make, seed):
    workload, cluster, candidates, costs = make(seed)
    least = go_through(workload, cluster, candidates, costs)
    if least is None:
        with pytest.raises(ValueError, match="it needs .* more than can be planned with"):
            search(workload, cluster, costs, candidates=candidates)
        return
    found = search(workload, cluster, costs, candidates=candidates)
    assert found.prediction.seconds == pytest.approx(least, rel=1e-12)
    assert found.is_optimal and found.prediction.fits
    assert all(found.choices[name] in candidates[name] for name in candidates)


@pytest.mark.parametrize("make", [make_case, make_predicted_case])
def test_plans_that_are_not_gone_through_are_near_the_best(make, monkeypatch):
    """Of small cases, by changes of plans alone."""
    monkeypatch.setattr("realjax.allocation.search.LARGEST_SPACE", 0)
    ratios = []
    for seed in range(20):
        workload, cluster, candidates, costs = make(seed)
        if (least := go_through(workload, cluster, candidates, costs)) is not None:
            found = search(workload, cluster, costs, Limits(most_plans=500), candidates=candidates)
            assert not found.is_optimal
            ratios.append(found.prediction.seconds / least)
    assert len(ratios) > 12 and max(ratios) < 1.3 and sum(one == 1 for one in ratios) > 0.8 * len(ratios)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_no_plan_of_all_candidates_is_faster(num_devices):
    """DPO as it is planned: candidates found, priced and pruned by the search."""
    cluster = find_cluster(f"h100x{num_devices}")
    shape = make_shape(7, num_layers=8)
    roles = {"ref": make_role("ref", shape), "actor": make_role("actor", shape, is_trained=True)}
    calls = (
        make_call("ref_inf", "inference", roles["ref"], num_sequences=4),
        make_call("actor_train", "train", roles["actor"], num_sequences=4, after=("ref_inf",)),
    )
    workload, costs = Workload(calls=calls, roles=roles), ClusterCosts(cluster=cluster)
    candidates = {call.name: list_choices(call, roles[call.role], cluster) for call in calls}
    found = search(workload, cluster, costs)
    assert found.is_optimal
    assert found.prediction.seconds == pytest.approx(go_through(workload, cluster, candidates, costs), rel=1e-12)


def make_large() -> tuple[Workload, Cluster, RandomCosts]:
    """Returns a step whose plans are too many to go through."""
    cluster = make_cluster(2, 8)
    costs = RandomCosts(seed=3, memory=float(cluster.memory_bytes), crowding=0.2)
    return make_ppo(0, 0, num_sequences=16), cluster, costs


def test_a_seed_and_a_number_of_plans_decide_the_result():
    workload, cluster, costs = make_large()
    limits = Limits(seed=5, most_plans=3000)
    first, again = (search(workload, cluster, costs, limits) for _ in range(2))
    assert first.choices == again.choices and first.num_plans == again.num_plans == 3000
    assert first.prediction == again.prediction
    assert not first.is_optimal and not first.was_cut


def test_longer_searches_are_no_worse():
    workload, cluster, costs = make_large()
    found = [search(workload, cluster, costs, Limits(most_plans=n)).prediction.seconds for n in (500, 2000, 8000)]
    assert found == sorted(found, reverse=True) and found[2] < found[0]


def test_the_wall_time_ends_a_search_and_is_told():
    workload, cluster, costs = make_large()
    start = time.monotonic()
    try:
        found = search(workload, cluster, costs, Limits(most_plans=10**9, most_seconds=2.0))
    finally:
        assert time.monotonic() - start < 20
    assert found.was_cut and not found.is_optimal and found.prediction.fits


def test_a_result_is_no_worse_than_a_given_plan():
    workload, cluster, costs = make_large()
    good = search(workload, cluster, costs, Limits(most_plans=8000))
    quick = search(workload, cluster, costs, Limits(most_plans=2), starts=[good.choices])
    assert quick.prediction.seconds <= good.prediction.seconds


def test_what_is_fixed_stays():
    workload, cluster, costs = make_large()
    fixed = Fixed(strategy=ParallelStrategy(dp=2, tp=2), devices=(4, 5, 6, 7))
    calls = tuple(replace(call, fixed=fixed) if call.name == "ref_inf" else call for call in workload.calls)
    limits = Limits(most_plans=2000)
    # Not even a plan by rule, in which the call is elsewhere, is a reason to move it.
    elsewhere = search(workload, cluster, costs, limits).choices
    found = search(replace(workload, calls=calls), cluster, costs, limits, starts=[elsewhere])
    assert (found.choices["ref_inf"].strategy, found.choices["ref_inf"].devices) == (fixed.strategy, fixed.devices)


def test_a_plan_by_rule_keeps_its_layouts():
    workload, cluster, costs = make_large()
    every = tuple(range(16))
    places = {call.name: Placement(strategy=ParallelStrategy(dp=8, tp=2), devices=every) for call in workload.calls}
    found = place_choices(workload, cluster, costs, places, Limits(most_plans=5000))
    for choice in found.choices.values():
        assert (choice.strategy.dp, choice.strategy.pp, choice.strategy.tp) == (8, 1, 2)
        assert not choice.strategy.sequence_parallel and choice.devices == every
    free = search(workload, cluster, costs, Limits(most_plans=5000), starts=[found.choices])
    assert free.prediction.seconds <= found.prediction.seconds


def test_a_single_layout_is_one_split_on_all_devices():
    workload, cluster, costs = make_large()
    # What a user wants of a call's devices has no place in it.
    calls = (replace(workload.calls[0], fixed=Fixed(devices=(0, 1))), *workload.calls[1:])
    found = list_single_layouts(replace(workload, calls=calls), cluster, costs, Limits(most_plans=5000))
    seen = set()
    for result in found:
        splits = {(one.strategy.pp, one.strategy.tp, one.strategy.dp, one.devices) for one in result.choices.values()}
        assert len(splits) == 1 and next(iter(splits))[3] == tuple(range(16))
        seen |= splits
    seconds = [result.prediction.seconds for result in found]
    assert len(seen) == len(found) > 1 and seconds == sorted(seconds)


def test_a_model_that_fits_nowhere_is_refused_with_what_it_lacks():
    workload, cluster, costs = make_large()
    tiny = replace(cluster, memory_bytes=cluster.memory_bytes // 1000)
    with pytest.raises(ValueError, match=r"actor_gen: as d.* on \d+ devices it needs .* GiB on each, .* more than can"):
        search(workload, tiny, costs)


def test_calls_that_fit_alone_and_not_together_are_refused():
    """Two roles that must stay on the one device, each of more than half of it."""
    roles = {name: make_role(name, make_shape(), offload=False) for name in "ab"}
    calls = tuple(make_call(f"{name}_inf", "inference", role) for name, role in roles.items())
    cluster = make_cluster(1, 1, memory_gib=10 / 2**30)
    costs = GivenCosts(home={"a": 5.0, "b": 4.5}, held={"a_inf": 1.0})
    with pytest.raises(ValueError, match="a_inf: as d1p1m1 on 1 devices"):
        search(Workload(calls=calls, roles=roles), cluster, costs)
    assert search(Workload(calls=calls[:1], roles=roles), cluster, costs).prediction.device_bytes == (6.0,)
    with_margin = replace(costs, margin=0.6)
    with pytest.raises(ValueError, match="a_inf"):
        search(Workload(calls=calls[:1], roles=roles), cluster, with_margin)


def test_a_model_too_large_for_the_cluster_is_told_with_the_smallest_change():
    cluster = find_cluster("h100x8")
    with pytest.raises(ValueError, match=r"actor_train: as .* GiB on each, .* more than can"):
        search(make_ppo(70, 7), cluster, ClusterCosts(cluster=cluster))


@pytest.mark.parametrize(("sizes", "num_devices"), [((7, 7), 8), ((70, 7), 64)])
def test_what_is_searched_beats_every_single_layout(sizes, num_devices):
    """PPO of Llama models on H100s, predicted."""
    cluster, workload = find_cluster(f"h100x{num_devices}"), make_ppo(*sizes)
    costs, limits = ClusterCosts(cluster=cluster), Limits(most_plans=4000)
    single = list_single_layouts(workload, cluster, costs, limits)[0]
    found = search(workload, cluster, costs, limits, starts=[single.choices])
    assert found.prediction.seconds < single.prediction.seconds and found.prediction.fits
    moved = [call for call in found.prediction.calls if call.source != "home"]
    assert all(call.moved_bytes > 0 < call.move_seconds for call in moved)
