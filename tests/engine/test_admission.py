"""Prompts are run once, where the slots are that go on from them, and no key or value moves between devices."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from realjax.aot.hlo import collectives
from realjax.core.axes import generate_rules
from realjax.core.generation_config import GenerationConfig
from realjax.engine.admission import SHORTEST_PROMPTS, Parts
from realjax.engine.batching import Batcher, Request, generate
from tests.engine.generation_cases import make_programs, make_requests
from tests.given.models import make_layout, make_model, place_params, random_tree

SAMPLED = GenerationConfig(max_new_tokens=12, min_new_tokens=2, top_k=20, top_p=0.9, temperature=0.8)


def make_entries(lengths: Sequence[int], group_size: int = 1) -> list[Request]:
    """Returns `group_size` samples of each of some prompts."""
    return [replace(r, sample_id=i) for r in make_requests(96, lengths) for i in range(group_size)]


@pytest.mark.parametrize("sizes", [{"dp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}], ids=str)
def test_admission_moves_no_keys_and_values(sizes):
    model, layout = make_model(head_dim=16), make_layout(**sizes)
    programs = make_programs(model, SAMPLED, layout, num_slots=16)
    params = place_params(model, random_tree(model, scale=0.4), layout, generate_rules(layout.strategy))
    generate(programs, params, make_requests(96, [9] * 16))
    (program,) = programs._admit.programs.values()
    sent = [sent for sent in collectives(program.as_text()) if "data" in sent.axes(layout)]
    # The least that a prompt's keys can be: of the shortest bucket, in one layer, with the heads split.
    one_prompt = 4 * SHORTEST_PROMPTS * model.config.num_kv_heads * model.config.head_dim // layout.strategy.tp
    assert sent and all(one.bytes < one_prompt / 4 for one in sent), sent  # what was drawn, and nothing else


@pytest.mark.parametrize("sizes", [{}, {"dp": 2, "tp": 2}, {"pp": 2}], ids=str)
def test_samples_of_a_prompt_share_it_and_are_those_of_prompts_run_one_by_one(sizes):
    model, layout = make_model(), make_layout(**sizes)
    params = place_params(model, random_tree(model, scale=0.4), layout, generate_rules(layout.strategy))
    requests = make_entries([3, 17, 8, 30], group_size=8)
    together, alone = (
        Batcher(make_programs(model, SAMPLED, layout, num_slots=num_slots, eos=range(6, 14)), params)
        for num_slots in (32 * layout.strategy.dp, layout.strategy.row_multiple)
    )
    results = []
    for batcher in (together, alone):
        numbers, found = batcher.submit(requests), {}
        while batcher.poll():
            pass
        found = batcher.results()
        results.append([found[number] for number in numbers])
    assert together.num_prompts == 4 and alone.num_prompts >= 16
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.kept, b.kept)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)
    assert len({tuple(generation.tokens) for generation in results[0][:8]}) > 4  # samples differ


def test_prompts_that_are_shared_need_a_smaller_program():
    parts = Parts(num_parts=2, slots_per_part=16, rows_per_part=8, prompt_multiple=2)
    admit = lambda requests, free: parts.admit([request.enter() for request in requests], free).prompts
    every = range(32)
    assert admit(make_entries([5, 9], 8), every).tokens.shape == (4, 32)
    assert admit(make_entries([5, 9, 40, 7], 4), every).tokens.shape == (4, 64)
    assert admit(make_entries([5] * 3, 1), every).tokens.shape == (16, 32)  # whatever is left for the last


@pytest.mark.parametrize("free", [range(32), [0, 1, 2, 3, 4, 20], [5, 30, 31], range(16)], ids=str)
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_each_row_is_beside_its_prompt_and_its_slot_is_free(free, group_size):
    parts = Parts(num_parts=4, slots_per_part=8, rows_per_part=3, prompt_multiple=1)
    num_rows = parts.count_rows(list(free))
    assert num_rows == sum(min(3, sum(slot // 8 == part for slot in free)) for part in range(4))
    requests = make_entries([4, 11, 33, 6, 7, 9, 12, 2, 3, 8, 10, 13], group_size)[:num_rows]
    found = parts.admit([request.enter() for request in requests], list(free))
    assert set(found.slots) <= set(free) and len(set(found.slots)) == len(found.slots) == num_rows
    prompts, per_part = found.prompts, len(found.prompts.tokens) // 4
    for request, index, slot in zip(requests, found.indices, found.slots, strict=True):
        part = index // 3
        assert (slot // 8, slot % 8) == (part, prompts.places[index])
        prompt = part * per_part + prompts.sources[index]
        assert prompts.lengths[prompt] == len(request.tokens)
        np.testing.assert_array_equal(prompts.tokens[prompt, : len(request.tokens)], request.tokens)
        assert (prompts.row_ids[index], prompts.sample_ids[index]) == (request.row_id, request.sample_id)
    unused = np.setdiff1d(np.arange(12), found.indices)
    assert (prompts.places[unused] == 8).all()
    assert found.num_prompts >= len({request.row_id for request in requests})
