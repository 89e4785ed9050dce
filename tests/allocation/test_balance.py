"""How `heuristic` shares devices out between training and the answers that are drawn beside it."""

from dataclasses import replace
from pathlib import Path

import pytest

from realjax.allocation.allocate import place_calls
from realjax.allocation.balance import find_cut, has_open_cut
from realjax.allocation.choice import Choice
from realjax.allocation.cluster import find_cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.run_workload import read_workload
from realjax.allocation.simulate import simulate
from realjax.dataflow.run import RunSpec
from tests.allocation.test_heuristic import LLAMA_7B
from tests.given.runs import Given, build_rl_spec

CLUSTER = find_cluster("h100x8")


def make_spec(given: Given, root: Path, num_new: int, **changes) -> RunSpec:
    """Returns a run that draws answers ahead on eight devices, as one of a model of seven billion parameters."""
    options = {
        "staleness": 1,
        "allocation_mode": "heuristic",
        "n_gpus_per_node": 8,
        "algo__gen__max_new_tokens": num_new,
    }
    spec = build_rl_spec(given, root, "grpo", **options | changes)
    return replace(spec, roles={name: replace(role, config=LLAMA_7B) for name, role in spec.roles.items()})


def test_the_longer_answers_are_the_more_devices_draw_them(given, tmp_path):
    cuts = [find_cut(make_spec(given, tmp_path, num_new), CLUSTER) for num_new in (1, 16, 96)]
    assert cuts == sorted(cuts, reverse=True) and cuts[0] > cuts[-1], cuts


@pytest.mark.parametrize("num_new", [4, 64])
def test_no_other_cut_makes_the_step_shorter(num_new, given, tmp_path):
    spec = make_spec(given, tmp_path, num_new)
    workload, found = read_workload(spec, CLUSTER.platform), find_cut(spec, CLUSTER)
    names = [mfc.name for mfc in spec.graph.mfcs]

    def seconds(cut: int) -> float:
        placed = place_calls(spec, cut)
        choices = {name: Choice(strategy=placed[name].strategy, devices=placed[name].devices) for name in names}
        return simulate(workload, choices, ClusterCosts(cluster=CLUSTER), CLUSTER).seconds

    assert seconds(found) == pytest.approx(min(map(seconds, range(1, 8))))


def test_two_devices_have_one_cut(given, tmp_path):
    assert not has_open_cut(make_spec(given, tmp_path, 8, n_gpus_per_node=2))
    assert not has_open_cut(make_spec(given, tmp_path, 8, staleness=0))
