"""Rows that draw several tokens a round, where these are as proposed, are those that draw them one by one."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.axes import generate_rules
from realjax.core.generation_config import GenerationConfig
from realjax.engine.batching import Batcher, Generation, Request
from realjax.engine.lookup import Lookup
from realjax.engine.sampling import Drawn, Sampler
from realjax.engine.slot_arrays import CHUNK_LEN, Chunk, Slots
from realjax.models.build import Model
from realjax.models.config import LayerKind, MoEConfig
from tests.engine.generation_cases import make_programs, make_requests
from tests.engine.test_polling import drain, has_stopped
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree

SAMPLED = GenerationConfig(max_new_tokens=50, min_new_tokens=2, top_k=20, top_p=0.95, temperature=0.6)
GREEDY = replace(SAMPLED, greedy=True)
PLAIN = make_model(max_positions=512)
SPARSE = LayerKind(name="sparse", feed_forward=MoEConfig(num_experts=5, experts_per_token=2, expert_size=12))
MODELS = {
    "plain": PLAIN,
    "experts": make_model(pattern=(LayerKind(name="dense"), SPARSE)),
    "windows": make_model(window=20),  # rings of 32 places
}
ENDS = range(6, 8)


def make_batcher(model: Model, config: GenerationConfig, num_proposed: int | None, *, eos=ENDS, stop_fn=None, **sizes):
    """Returns a batcher of four slots, with parameters whose layers change little: the next token is nearly that which
    followed the last one before.
    """
    layout, records = make_layout(**sizes), {"records_routes": model.config.routes is not None}
    config = replace(config, prompt_lookup_num_tokens=num_proposed)
    programs = make_programs(model, config, layout, num_slots=4, eos=eos, **records)
    params = random_tree(model, scale=0.5)
    params["layers"] = jax.tree.map(lambda x: x * 0.5, params["layers"])
    placed = place_params(model, params, layout, generate_rules(layout.strategy))
    return Batcher(programs, placed, stop_fn=stop_fn)


def make_texts() -> list[Request]:
    """Returns prompts of unequal lengths, of which every third row is greedy: more than there are slots."""
    return [replace(one, is_greedy=one.row_id % 3 == 1) for one in make_requests(96)]


@pytest.fixture(scope="module")
def plain():
    """The answers to `make_texts` drawn one by one, and in how many rounds, by model and options."""
    made = {}

    def answer(name: str, config: GenerationConfig) -> tuple[list[Generation], int]:
        if (name, config) not in made:
            batcher = make_batcher(MODELS[name], config, None)
            made[name, config] = batcher.answer(make_texts()), batcher.num_rounds
            assert batcher.per_round.weight == 0
        return made[name, config]

    return answer


def assert_same(found: Sequence[Generation], expected: Sequence[Generation]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.kept, b.kept)
        np.testing.assert_array_equal(a.routes, b.routes)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)
        assert a.ended == b.ended


@pytest.mark.parametrize(
    ("name", "config", "num_proposed", "sizes"),
    [
        ("plain", SAMPLED, 1, {}),
        ("plain", SAMPLED, 3, {"dp": 2}),
        ("plain", SAMPLED, 3, {"tp": 2}),
        ("plain", SAMPLED, 31, {"dp": 2, "tp": 2}),  # as much as a chunk
        ("plain", replace(GREEDY, max_new_tokens=150), 3, {}),  # the cache grows on the way
        ("experts", SAMPLED, 3, {}),
        ("windows", SAMPLED, 12, {}),
    ],
    ids=str,
)
def test_answers_are_those_drawn_one_by_one(plain, name, config, num_proposed, sizes):
    expected, num_rounds = plain(name, config)
    lengths = [len(one.tokens) for one in expected]
    assert config.max_new_tokens in lengths and min(lengths) < config.max_new_tokens  # cut, and ended by themselves
    batcher = make_batcher(MODELS[name], config, num_proposed, **sizes)
    assert_same(batcher.answer(make_texts()), expected)
    # All but the first token of each answer are drawn in rounds.
    assert batcher.per_round.sum == sum(lengths) - len(lengths)
    assert batcher.per_round.value > 1.2 and batcher.num_rounds < num_rounds


def test_an_answer_ends_at_end_of_text_among_tokens_that_were_as_proposed():
    config = replace(GREEDY, min_new_tokens=0)
    long = make_batcher(PLAIN, replace(config, max_new_tokens=60), None, eos=())
    requests = make_requests(96, [3, 17, 8, 1])
    texts = long.answer(requests)
    # Rows that have come far enough to repeat themselves, and end two tokens further on.
    begun = [replace(one, tokens=np.concatenate([one.tokens, text.tokens[:50]])) for one, text in zip(requests, texts)]
    ends = [int(text.tokens[52]) for text in texts]
    expected = make_batcher(PLAIN, config, None, eos=ends).answer(begun)
    batcher = make_batcher(PLAIN, config, 8, eos=ends)
    assert_same(batcher.answer(begun), expected)
    assert all(one.ended for one in expected) and max(len(one.tokens) for one in expected) == 3
    assert batcher.num_rounds == 1


def test_a_stop_text_ends_an_answer_where_it_would_without():
    config = replace(SAMPLED, max_new_tokens=100, min_new_tokens=60)
    expected, found = (make_batcher(PLAIN, config, num, stop_fn=has_stopped).answer(make_texts()) for num in (None, 3))
    assert_same(found, expected)
    lengths = {len(one.tokens) for one in expected}
    assert len(lengths) > 3 and min(lengths) < 60


def test_rows_taken_out_and_put_in_again_go_on_as_if_nothing_had_been(plain):
    batcher, requests = make_batcher(PLAIN, SAMPLED, 3), make_texts()
    batcher.chunk_len = 4
    numbers = batcher.submit(requests)
    for _ in range(6):
        batcher.poll()
    taken = batcher.take_out(numbers)
    assert any(request.num_begun > 4 for request in taken.values())
    found = batcher.results()
    again = dict(zip(batcher.submit(taken.values()), taken))
    found |= {again[number]: generation for number, generation in drain(batcher).items()}
    assert_same([found[number] for number in numbers], plain("plain", SAMPLED)[0])


def propose(text: np.ndarray, num_tokens: int, ngram_size: int) -> list[int]:
    """Returns what follows the longest of a text's endings, up to a length, where it stood last, round and round."""
    for size in range(min(ngram_size, len(text) - 1), 0, -1):
        for place in range(len(text) - 2, size - 2, -1):
            if (text[place - size + 1 : place + 1] == text[-size:]).all():
                after = text[place + 1 :]
                return [int(after[i % len(after)]) for i in range(num_tokens)]
    return [int(text[-1])] * num_tokens


@pytest.mark.parametrize("ngram_size", [1, 3])
def test_what_is_proposed_followed_the_longest_ending_that_stood_before(ngram_size):
    rng, room, num_tokens = np.random.default_rng(0), 24, 5
    texts = [rng.integers(0, 4, n).astype(np.int32) for n in [*range(2, 25), 24, 24]]
    held = rng.integers(0, 4, (len(texts), room)).astype(np.int32)  # what lies behind a text is not read
    for row, text in zip(held, texts):
        row[: len(text) - 1] = text[:-1]
    lengths, last = (np.array([get(text) for text in texts]) for get in (lambda x: len(x) - 1, lambda x: x[-1]))
    lookup = Lookup(num_tokens=num_tokens, ngram_size=ngram_size)
    slots = make_slots(lengths=lengths, last_tokens=last, texts=held)
    expected = [[int(text[-1]), *propose(text, num_tokens, ngram_size)] for text in texts]
    np.testing.assert_array_equal(quick_jit(lookup.take_in)(slots), expected)


def make_slots(**arrays: np.ndarray) -> Slots:
    """Returns slots with these arrays, as far as a lookup reads them."""
    zeros = np.zeros(len(arrays["lengths"]), np.int32)
    rest = {"last_tokens": zeros, "num_generated": zeros, "is_running": zeros == 0}
    arrays = {name: jnp.asarray(x) for name, x in {**rest, **arrays}.items()}
    return Slots(cache=(), flight=(), is_full=jnp.array(False), keys=jnp.zeros(len(zeros)), is_greedy=None, **arrays)


def test_tokens_are_kept_up_to_what_differs_ends_or_has_no_room():
    """Rows: all as proposed; the second is not; an end among them; two to come at most; little room; an idle one."""
    drawn = np.array([[1, 2, 3, 4], [1, 9, 3, 4], [1, 7, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]], np.int32)
    tokens = np.array([[0, 1, 2, 3]] * 6, np.int32)
    tokens[2, 2] = 7
    generated, most = np.array([4, 4, 4, 18, 4, 4]), np.array([9, 9, 9, 9, 3, 9])
    slots = make_slots(
        lengths=np.full(6, 5),
        last_tokens=np.zeros(6, np.int32),
        num_generated=generated,
        is_running=np.arange(6) < 5,
        texts=np.zeros((6, 9), np.int32),
    )
    sampler = Sampler(config=GenerationConfig(max_new_tokens=20), eos_ids=(7,), seed=0)
    counts = np.array([2, 2, 2, 2, 2, 0])
    chunk = Chunk(
        sampler.init_drawn((6, CHUNK_LEN), 8), jnp.asarray(counts), slots.is_running, jnp.array(1), own_rounds=counts
    )
    chunk = replace(chunk, drawn=replace(chunk.drawn, kept=None))
    logprobs = np.arange(24, dtype=np.float32).reshape(6, 4) - 24
    keep = Lookup(num_tokens=3, ngram_size=2).keep
    slots, chunk = quick_jit(lambda *args: keep(*args, sampler=sampler, most=most))(
        slots, chunk, tokens, Drawn(drawn, logprobs, None), None
    )
    num = np.array([4, 2, 2, 2, 3, 0])
    np.testing.assert_array_equal(chunk.counts - counts, num)
    np.testing.assert_array_equal(chunk.own_rounds - counts, [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(slots.lengths, 5 + num)
    np.testing.assert_array_equal(slots.num_generated, generated + num)
    np.testing.assert_array_equal(slots.is_running, [True, True, False, False, True, False])
    np.testing.assert_array_equal(slots.last_tokens, [4, 9, 7, 2, 3, 0])
    for row in range(6):
        at = slice(2, 2 + num[row])
        np.testing.assert_array_equal(chunk.drawn.tokens[row, at], drawn[row, : num[row]])
        np.testing.assert_array_equal(chunk.drawn.logprobs[row, at], logprobs[row, : num[row]])
        assert not chunk.drawn.logprobs[row, 2 + num[row] :].any()
        if num[row]:  # all that is in the cache
            before_last = [0, *drawn[row, : num[row] - 1]]
            np.testing.assert_array_equal(slots.texts[row, 5 : 5 + num[row]], before_last)


def test_what_cannot_be_looked_up_is_refused_and_nothing_is_made_without_it():
    looking = replace(SAMPLED, prompt_lookup_num_tokens=13)
    with pytest.raises(
        ValueError, match="prompt_lookup_num_tokens=13 needs one pipeline stage, and there are 2; leave"
    ):
        make_programs(PLAIN, looking, make_layout(pp=2))
    with pytest.raises(ValueError, match="=13: a layer with a window has places for 12 more tokens; lower it to that"):
        make_programs(MODELS["windows"], looking, make_layout())
    off = make_programs(PLAIN, replace(SAMPLED, prompt_lookup_num_tokens=0), make_layout()).start(32, has_greedy=False)
    assert off.texts is None
