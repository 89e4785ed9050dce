"""Rows that come, stop, leave and come back between chunks are those of one undisturbed call."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
import pytest

from realjax.core.axes import generate_rules
from realjax.core.generation_config import GenerationConfig
from realjax.core.trees import Tree
from realjax.engine.batching import Batcher, Generation, Request, generate
from realjax.engine.slots import SlotPrograms
from tests.engine.generation_cases import make_programs, make_requests
from tests.given.models import make_layout, make_model, place_params, random_tree

ENDS = range(6, 10)
SAMPLED = GenerationConfig(max_new_tokens=24, min_new_tokens=2, top_k=20, top_p=0.9, temperature=0.8)
Setup = Callable[..., tuple[SlotPrograms, Tree]]


@pytest.fixture(scope="module")
def setup() -> Setup:
    """Programs and placed parameters by layout and options, each made once.

    Of a model with windows, whose caches are rings of 32 places: rows come, leave and come back longer than that.
    """
    model, made = make_model(window=20), {}

    def make(seed: int = 0, config: GenerationConfig = SAMPLED, **sizes: int) -> tuple[SlotPrograms, Tree]:
        key = (config, *sizes.items())
        layout = make_layout(**sizes)
        if key not in made:
            made[key] = make_programs(model, config, layout, num_slots=4, eos=ENDS)
        return made[key], place_params(model, random_tree(model, seed, 0.4), layout, generate_rules(layout.strategy))

    return make


def drain(batcher: Batcher) -> dict[int, Generation]:
    """Polls until no row is left; returns all results."""
    found = batcher.results()
    while batcher.poll():
        found |= batcher.results()
    return found | batcher.results()


def assert_same(found: Sequence[Generation], expected: Sequence[Generation], atol: float = 0) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.kept, b.kept)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=atol)
        assert a.ended == b.ended


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}], ids=str)
def test_how_long_chunks_are_changes_no_bit(setup, sizes):
    programs, params = setup(**sizes)
    requests = make_requests(96)
    expected = generate(programs, params, requests)
    for chunk_len in (1, 5):
        batcher = Batcher(programs, params, chunk_len=chunk_len)
        numbers = batcher.submit(requests)
        found = drain(batcher)
        assert_same([found[number] for number in numbers], expected)


def test_rows_added_while_others_decode_are_their_own(setup):
    programs, params = setup()
    # The later ones ask for what the first do not need: greedy rows, and longer caches.
    requests = [replace(request, is_greedy=i == 5) for i, request in enumerate(make_requests(96, [3, 9, 1, 5, 4, 99]))]
    expected = generate(programs, params, requests)
    batcher = Batcher(programs, params, chunk_len=4)
    numbers, found = batcher.submit(requests[:1]), {}
    for request in requests[1:]:
        assert batcher.poll() and batcher.poll() and batcher.poll()
        found |= batcher.results()
        numbers += batcher.submit([request])
    found |= drain(batcher)
    assert numbers == [0, 1, 2, 3, 4, 5] and sorted(found) == numbers
    assert list(found) != numbers  # in order of ending
    assert_same([found[number] for number in numbers], expected, atol=1e-5)


def test_a_poll_sends_one_program_and_waits_for_those_before_alone(setup, monkeypatch):
    programs, params = setup()
    sent, fetched = [], []
    for name in ("admit", "decode"):
        program = getattr(programs, name)

        def record(*args, program=program):
            slots, chunk = program(*args)
            sent.append(chunk)
            return slots, chunk

        monkeypatch.setattr(programs, name, record)

    def fetch(chunk):
        assert all(chunk is not new for new in sent[num_before:])
        fetched.append(chunk)
        return jax.tree.map(np.asarray, chunk)

    batcher = Batcher(programs, params, fetch_fn=fetch, chunk_len=4)
    batcher.submit(make_requests(96))
    num_before, num_ahead, is_left = 0, 0, True
    while is_left:
        num_before = len(sent)
        is_left = batcher.poll()
        assert len(sent) - num_before <= 1
        num_ahead += len(sent) > num_before and len(fetched) == num_before
    # Nearly always the devices have the next program before the host looks at the last one.
    assert num_ahead > len(sent) / 2 and len(sent) > 20


@pytest.mark.parametrize(("num_prompt", "num_new", "length"), [(30, 230, 288), (30, 300, 416), (100, 8, 128)])
def test_a_cache_grows_to_what_its_rows_can_need_and_no_further(num_prompt, num_new, length):
    model, layout = make_model(max_positions=512), make_layout()
    config = GenerationConfig(max_new_tokens=num_new, min_new_tokens=num_new, top_k=5)
    programs = make_programs(model, config, layout, num_slots=4)
    params = place_params(model, random_tree(model, scale=0.4), layout, generate_rules(layout.strategy))
    batcher = Batcher(programs, params)
    (number,) = batcher.submit(make_requests(96, [num_prompt]))
    assert len(drain(batcher)[number].tokens) == num_new
    assert batcher._slots is not None and programs.cache_length(batcher._slots) == length


def is_stop(tokens: np.ndarray) -> np.ndarray:
    return tokens % 8 == 3


def has_stopped(prompt: np.ndarray, tokens: np.ndarray, num_seen: int) -> bool:
    """The answer holds a token that stops it, which nobody has told of its first `num_seen`."""
    assert not is_stop(tokens[:num_seen]).any() and num_seen < len(tokens)
    return bool(is_stop(tokens).any())


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}], ids=str)
def test_a_stopped_row_ends_there_and_its_slot_goes_to_the_next(setup, sizes):
    programs, params = setup(config=replace(SAMPLED, max_new_tokens=40, min_new_tokens=30), **sizes)
    requests = make_requests(96)
    whole = Batcher(programs, params, chunk_len=4)
    whole.submit(requests)
    uncut, expected = drain(whole), []
    for number in range(len(requests)):
        generation, places = uncut[number], np.flatnonzero(is_stop(uncut[number].tokens))
        assert generation.kept is not None
        n = places[0] + 1 if len(places) else len(generation.tokens)
        cut = {"tokens": generation.tokens[:n], "logprobs": generation.logprobs[:n], "kept": generation.kept[:n]}
        expected.append(Generation(ended=bool(len(places)) or generation.ended, **cut))
    assert len({len(generation.tokens) for generation in expected}) > 3
    for chunk_len in (1, 4):
        batcher = Batcher(programs, params, stop_fn=has_stopped, chunk_len=chunk_len)
        numbers = batcher.submit(requests)
        found = drain(batcher)
        assert_same([found[number] for number in numbers], expected, atol=1e-5)
        assert 0 < batcher.num_rounds < 0.75 * whole.num_rounds, (batcher.num_rounds, whole.num_rounds)


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("num_polls", [6, 13])
def test_a_row_taken_out_and_put_in_again_goes_on_as_if_nothing_had_been(setup, sizes, num_polls):
    programs, params = setup(**sizes)
    requests = [replace(request, is_greedy=i == 1, sample_id=7 + i) for i, request in enumerate(make_requests(96))]
    expected = generate(programs, params, requests)
    batcher = Batcher(programs, params, chunk_len=2)
    numbers = batcher.submit(requests)
    for _ in range(num_polls):
        batcher.poll()
    taken = batcher.take_out([0, 1, 2, 8])  # the last one waits
    assert taken[8] is requests[8] and {len(request.tokens) for request in taken.values()} <= {3, 17, 8, 21}
    assert any(request.num_begun > 2 for request in taken.values())
    found = batcher.results()
    assert {0, 1, 2, 8} <= taken.keys() | found.keys() and not taken.keys() & found.keys()
    for _ in range(4):
        batcher.poll()
    again = dict(zip(batcher.submit(taken.values()), taken))
    found |= {again.get(number, number): generation for number, generation in drain(batcher).items()}
    assert sorted(found) == numbers
    assert_same([found[number] for number in numbers], expected, atol=1e-5)
    for number, request in taken.items():
        if request.begun is not None:
            n = request.num_begun
            np.testing.assert_array_equal(found[number].logprobs[:n], request.begun.logprobs)


def test_a_row_put_in_under_other_parameters_keeps_what_it_has_and_goes_on_by_them(setup):
    greedy = GenerationConfig(max_new_tokens=16, min_new_tokens=0, greedy=True)
    programs, old = setup(config=greedy)
    _, new = setup(seed=1, config=greedy)
    requests = make_requests(96)
    before = Batcher(programs, old, chunk_len=2)
    before.submit(requests)
    for _ in range(9):
        before.poll()
    taken = before.take_out(range(len(requests)))
    ended = drain(before)
    assert taken.keys() | ended.keys() == set(range(len(requests)))
    begun = {number: request.num_begun for number, request in taken.items()}
    assert max(begun.values()) > 3 and min(begun.values()) == 0 and ended, (begun, len(ended))
    found = generate(programs, new, list(taken.values()))
    # Whoever starts with all of these tokens as a prompt writes the same from there.
    prompts = [_with_prompt(request) for request in taken.values()]
    fresh = generate(programs, new, prompts)
    for request, generation, rest in zip(taken.values(), found, fresh, strict=True):
        n = request.num_begun
        if request.begun is not None:
            np.testing.assert_array_equal(generation.tokens[:n], request.begun.tokens)
            np.testing.assert_array_equal(generation.logprobs[:n], request.begun.logprobs)
        num_new = len(generation.tokens) - n
        np.testing.assert_array_equal(generation.tokens[n:], rest.tokens[:num_new])
        np.testing.assert_allclose(generation.logprobs[n:], rest.logprobs[:num_new], atol=1e-5)


def _with_prompt(request: Request) -> Request:
    begun = np.zeros(0, np.int32) if request.begun is None else request.begun.tokens
    return replace(request, tokens=np.concatenate([request.tokens, begun]), begun=None)


def test_what_cannot_go_on_is_refused(setup):
    programs, params = setup()
    (request,) = make_requests(96, [4])
    (generation,) = generate(programs, params, [request])
    batcher = Batcher(programs, params)
    with pytest.raises(ValueError, match="before, .* tokens, is complete or not below max_new_tokens=24; only a row"):
        batcher.submit([replace(request, begun=replace(generation, ended=True))])
    begun = replace(generation, tokens=generation.tokens[:1], logprobs=generation.logprobs[:1], ended=False, kept=None)
    with pytest.raises(ValueError, match="prompt 0 before records kept tokens in another form; go on with the same"):
        batcher.submit([replace(request, begun=begun)])
    assert batcher.submit([]) == [] and not batcher.poll()
