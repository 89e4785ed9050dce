"""When the planner has the last answers of a call go on with more tensor parallelism."""

from dataclasses import replace

import numpy as np
import pytest

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import find_cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.cost import call_cost
from realjax.allocation.memory import call_memory
from realjax.allocation.search import search
from realjax.allocation.tails import find_tail_fault, list_tail_sizes
from realjax.allocation.terms.decode_cost import count_last_rounds
from realjax.allocation.workload import CallWork, Fixed, Lengths, Workload
from realjax.core.layout import ParallelStrategy
from tests.given.workloads import make_call, make_role, make_shape

CLUSTER = find_cluster("h100x8")
COSTS = ClusterCosts(cluster=CLUSTER)
ROLE = make_role("actor", make_shape(7))
# Most answers are short, and few of them are eight times as long.
SPREAD = Lengths(mean=256, mean_square=2 * 256**2, longest=2048)
D8 = ParallelStrategy(dp=8)
CHOICE = Choice(strategy=D8, devices=tuple(range(8)), num_slots=256, tail_slots=32, tail_tp=8)


def make_work(answers: Lengths = SPREAD, **fixed) -> CallWork:
    call = make_call("actor_gen", "generate", ROLE, fixed=Fixed(strategy=D8, **fixed))
    return replace(call, answers=answers, most_new_tokens=2048)


def find_best(work: CallWork) -> Choice:
    return search(Workload(calls=(work,), roles={"actor": ROLE}), CLUSTER, COSTS).choices["actor_gen"]


@pytest.mark.parametrize("num_parts", [1, 8])
def test_rounds_with_few_rows_left_are_those_of_drawn_lengths(num_parts):
    rng, (num_rows, few) = np.random.default_rng(0), (256, 32)
    exponent = SPREAD.longest / SPREAD.mean - 1
    lengths = SPREAD.longest * rng.beta(1, exponent, (2000, num_parts, num_rows // num_parts))
    # From when no part has more rows than its slots, until the longest there can be has ended.
    begins = np.sort(lengths, axis=2)[:, :, -few // num_parts - 1].max(axis=1)
    choice = replace(CHOICE, strategy=ParallelStrategy(dp=num_parts), tail_slots=few)
    found = count_last_rounds(num_rows, num_rows, choice, SPREAD)
    assert found == pytest.approx(SPREAD.longest - begins.mean(), rel=0.08)


def test_a_search_moves_the_last_answers_where_that_is_a_gain():
    best = find_best(make_work())
    assert best.tail is not None and best.tail.strategy == ParallelStrategy(tp=8)
    stays = replace(best, tail_slots=None, tail_tp=None)
    seconds = [call_cost(make_work(), choice, CLUSTER).seconds for choice in (best, stays)]
    assert seconds[0] < 0.95 * seconds[1]
    # Answers that are all as long end together; and nobody asked.
    assert find_best(make_work(Lengths.all(2048))).tail is None
    assert find_best(make_work(tail_slots=0)).tail is None
    assert find_best(make_work(Lengths.all(2048), tail_slots=12)).tail_slots == 16


def test_a_tail_costs_its_move_and_a_part_of_the_parameters():
    terms = call_cost(make_work(), CHOICE, CLUSTER).terms
    assert terms["tail"] > terms["tail_move"] > 0
    plain = replace(CHOICE, tail_slots=None, tail_tp=None)
    bytes_of = lambda choice: call_memory(make_work(), ROLE, choice, at_home=True).bytes
    assert bytes_of(CHOICE) - bytes_of(plain) == pytest.approx(2 * ROLE.model.num_params / 8, rel=0.01)


def test_what_has_no_tail():
    assert find_tail_fault(ParallelStrategy(dp=2, pp=2)) and find_tail_fault(ParallelStrategy(dp=2, ep=2))
    assert find_tail_fault(ParallelStrategy(tp=8)) and not find_tail_fault(D8)
    assert list_tail_sizes(ParallelStrategy(dp=12), (32, 64, 96)) == [2, 4]
    assert list_tail_sizes(ParallelStrategy(dp=4, tp=2), (32, 64, 96)) == [4, 8]
    with pytest.raises(ValueError, match="gen.tail_slots=4 was too, and it has 2 pipeline stages"):
        find_best(replace(make_work(), fixed=Fixed(strategy=ParallelStrategy(dp=4, pp=2), tail_slots=4)))
