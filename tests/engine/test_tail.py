"""The last rows of a call that go on in another layout are those of a call that stays."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from realjax.aot.hlo import collectives
from realjax.core.axes import generate_rules
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout, ParallelStrategy
from realjax.engine.batching import Batcher, generate
from realjax.engine.slots import SlotPrograms
from realjax.engine.tail import Tail
from realjax.reshard.apply import reshard
from tests.engine.generation_cases import make_programs, make_requests
from tests.given.models import make_layout, make_model, place_params, random_tree

MODEL = make_model(window=20, num_q_heads=8, num_kv_heads=4)
SAMPLED = GenerationConfig(max_new_tokens=60, min_new_tokens=2, top_k=20, top_p=0.9, temperature=0.8)
ENDS = range(6, 14)


def move(tree: Any, places: Any, free_source: bool) -> tuple[Any, int]:
    moved, report = reshard(tree, places, free_source=free_source)
    return moved, report.bytes_moved


def make_tail(source: SlotPrograms, tp: int, num_slots: int) -> Tail:
    layout = source.layout.share_layers(tp)
    return Tail(source, SlotPrograms(MODEL, layout, source.sampler, num_slots, Compute()), move)


@pytest.mark.parametrize(
    ("sizes", "tp", "config"),
    [
        ({"dp": 4}, 4, SAMPLED),
        ({"dp": 4}, 2, replace(SAMPLED, prompt_lookup_num_tokens=3)),
        ({"dp": 2, "tp": 2}, 4, replace(SAMPLED, greedy=True)),
    ],
    ids=str,
)
def test_rows_that_move_are_those_that_stay(sizes, tp, config):
    layout = make_layout(**sizes)
    params = place_params(MODEL, random_tree(MODEL, 0, 0.4), layout, generate_rules(layout.strategy))
    programs = make_programs(MODEL, config, layout, num_slots=8, eos=ENDS)
    # Rows of one prompt differ by their sample, one is greedy, one begins where another was interrupted.
    prompts = make_requests(96, [3, 17, 8, 1, 30, 12, 5, 9, 21, 40, 2, 7])
    requests = [replace(one, sample_id=i, is_greedy=i == 4) for i, one in enumerate(prompts)]
    expected = generate(programs, params, requests)
    tail = make_tail(programs, tp, num_slots=4)
    batcher = Batcher(programs, params, chunk_len=4, tail=tail)
    numbers = batcher.submit(requests)
    found, num_left = batcher.results(), 0
    while batcher.poll():
        if batcher.programs is programs:
            num_left = len(batcher.drawn())
        found |= batcher.results()
        if batcher.programs is tail.programs and config.prompt_lookup_num_tokens:
            assert_has_texts(batcher)
    found |= batcher.results()
    assert batcher.programs is tail.programs and num_left >= 2, "rows have moved"
    for number, one in zip(numbers, expected, strict=True):
        np.testing.assert_array_equal(found[number].tokens, one.tokens)
        np.testing.assert_allclose(found[number].logprobs, one.logprobs, rtol=0, atol=2e-5)
        assert found[number].ended == one.ended


def assert_has_texts(batcher: Batcher) -> None:
    """The tokens that a row is known to have are there, where what follows them is looked up."""
    assert batcher._slots is not None and batcher._slots.texts is not None
    for slot, row in batcher._active.items():
        known = row.interrupt().enter().tokens[:-1]
        np.testing.assert_array_equal(np.asarray(batcher._slots.texts)[slot, : len(known)], known)


def test_a_move_sends_heads_of_caches_and_no_parameter():
    """Each device has its part of the parameters already, and a part of the keys and values of each row is sent."""
    layout = make_layout(dp=4)
    params = place_params(MODEL, random_tree(MODEL, 0, 0.4), layout, generate_rules(layout.strategy))
    programs = make_programs(MODEL, SAMPLED, layout, num_slots=8)
    tail = make_tail(programs, 4, num_slots=4)
    prepared = programs.prepare(params)
    _, report = reshard(prepared, tail.programs.list_places())
    assert report.bytes_moved == 0
    slots = programs.start(128, has_greedy=False)
    index = jax.ShapeDtypeStruct((4,), np.int32, sharding=programs.places.lengths)
    assert not collectives(tail._take.lower(slots.cache, index).compile().as_text() or "")
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(slots.cache))
    entry = make_requests(96, [7])[0].enter()
    *_, moved = tail.move(prepared, slots, {0: entry, 3: entry, 4: entry})
    assert moved == {0: 0, 3: 1, 4: 2}
    # Half of the slots go on; of each row, three quarters of the heads belong to others.
    assert tail.bytes_moved == num_bytes / 2 * 3 / 4


def test_what_cannot_move_is_refused():
    programs = make_programs(MODEL, SAMPLED, make_layout(dp=2, pp=2), num_slots=8)
    with pytest.raises(ValueError, match="one pipeline stage"):
        programs.layout.share_layers(2)
    with pytest.raises(ValueError, match="times a divisor of dp=4"):
        make_layout(dp=4).share_layers(3)
    programs = make_programs(MODEL, SAMPLED, make_layout(dp=4), num_slots=8)
    other = Layout.of(ParallelStrategy(tp=4), jax.devices()[4:8])
    with pytest.raises(ValueError, match="fewer slots, a multiple of 4"):
        Tail(programs, SlotPrograms(MODEL, other, programs.sampler, 4, Compute()), move)
