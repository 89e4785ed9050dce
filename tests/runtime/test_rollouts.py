"""Prompts become requests with randomness of their own, answers become packed sequences, and these minibatches."""

import numpy as np
import pytest

from realjax.allocation.plan import RolloutShape
from realjax.core.batch import Batch
from realjax.core.generation_config import GenerationConfig
from realjax.data.packing import bucket_rows, pack, pack_rows, unpack
from realjax.dataflow.graph import Generate, Minibatches
from realjax.engine.batching import Generation
from realjax.runtime.rollouts import Chosen, answer_requests, make_minibatches, make_requests, pack_rollout
from tests.given.models import make_layout  # noqa: F401 - eight devices before any array

CONFIG = GenerationConfig(max_new_tokens=6, min_new_tokens=0)


def make_prompts(lengths: list[int], ids: list[int] | None = None) -> Batch:
    rng = np.random.default_rng(0)
    examples = [
        {"tokens": rng.integers(3, 50, length).astype(np.int32), "prompt_id": np.array(number, np.int32)}
        for number, length in zip(ids or range(len(lengths)), lengths, strict=True)
    ]
    return pack(examples, pack_rows(lengths, 12))


def make_call(**changes) -> Generate:
    return Generate(**{"name": "gen", "role": "actor", "inputs": (), "config": CONFIG, "eos_ids": (2,), **changes})


def answer(requests) -> list[Generation]:
    """Returns an answer to each request that tells which request it belongs to."""
    rng = np.random.default_rng(1)
    answers = []
    for i, request in enumerate(requests):
        tokens = np.append(rng.integers(3, 50, i % 5), 2).astype(np.int32)
        kept = np.full((len(tokens), 2), request.row_id + 1, np.int32)
        answers.append(Generation(tokens=tokens, logprobs=-np.arange(1.0, len(tokens) + 1), ended=i % 3 > 0, kept=kept))
    return answers


def test_every_sample_of_a_run_has_randomness_of_its_own():
    """Row and sample number differ between samples, steps, and two occurrences of a prompt in one batch."""
    prompts = make_prompts([3, 4, 5], ids=[7, 8, 7])
    seen = [
        (request.row_id, request.sample_id)
        for step in range(3)
        for request in make_requests(prompts, make_call(num_samples=2), step)
    ]
    assert len(set(seen)) == len(seen) == 18
    assert {row for row, _ in seen} == {7, 8}
    again = make_requests(prompts, make_call(num_samples=2), 1)
    assert [(request.row_id, request.sample_id) for request in again] == seen[6:12]
    alike = [make_requests(make_prompts([3, 4]), make_call(num_samples=2, repeats=True), step) for step in (0, 5)]
    assert [[request.sample_id for request in step] for step in alike] == [[0, 1, 0, 1]] * 2


def test_answers_that_are_given_stand_in_for_drawn_ones():
    given_fn = lambda row_id, sample_id: np.array([row_id, sample_id, 2]) if (row_id + sample_id) % 2 else None
    call = make_call(num_samples=2, given_fn=given_fn)
    requests = make_requests(make_prompts([3, 4, 5]), call, 0)
    asked = []
    one = Generation(tokens=np.array([9]), logprobs=np.array([-1.0]), ended=False, kept=None)
    draw = lambda left: asked.extend(left) or [one] * len(left)
    found = answer_requests(requests, call, draw)
    for request, generation in zip(requests, found, strict=True):
        is_given = (request.row_id + request.sample_id) % 2
        assert generation.tokens.tolist() == ([request.row_id, request.sample_id, 2] if is_given else [9])
        assert generation.ended == bool(is_given)
    assert asked == [request for request in requests if (request.row_id + request.sample_id) % 2 == 0] != []
    every = make_call(given_fn=lambda row_id, sample_id: np.array([5]))
    assert not any(one.ended for one in answer_requests(make_requests(make_prompts([3]), every, 0), every, draw))


def test_a_rollout_holds_each_prompt_with_its_answer():
    """Taken apart again, every sequence is a prompt and its answer, and its keys belong to them."""
    call = make_call(num_samples=2, has_baseline=True)
    requests = make_requests(make_prompts([3, 9, 1, 4]), call, 0)
    assert [request.is_greedy for request in requests] == [False, False, True] * 4
    answers = answer(requests)
    rollout = pack_rollout(requests, answers, call, RolloutShape(row_len=32, row_multiple=4, num_slots=1))
    assert rollout.num_rows % 4 == 0
    assert rollout.row_len == 32
    found = {(int(s["group"]), int(s["sample_id"])): s for s in unpack(rollout)}
    assert len(found) == len(requests)
    for i, (request, generation) in enumerate(zip(requests, answers, strict=True)):
        sequence, start = found[i // 3, i % 3], len(request.tokens)
        np.testing.assert_array_equal(sequence["tokens"], [*request.tokens, *generation.tokens])
        np.testing.assert_array_equal(sequence["loss_mask"], np.arange(len(sequence["tokens"])) >= start)
        np.testing.assert_array_equal(sequence["logprobs"][start:], generation.logprobs)
        assert not sequence["logprobs"][:start].any()
        np.testing.assert_array_equal(sequence["kept"][start:], generation.kept)
        assert not sequence["kept"][:start].any()
        assert bool(sequence["has_eos"]) == generation.ended
        assert bool(sequence["is_baseline"]) == request.is_greedy
        assert int(sequence["prompt_id"]) == request.row_id


@pytest.mark.parametrize("shuffle", [True, False])
def test_minibatches_share_out_a_rollout(shuffle):
    """Each sequence is in one minibatch; they have equal shapes, equal counts give or take one, and similar tokens."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 30, 41)
    examples = [{"tokens": np.full(n, i, np.int32), "loss_mask": np.ones(n, bool)} for i, n in enumerate(lengths)]
    rollout = pack(examples, pack_rows(lengths, 32))
    minibatches = Minibatches(count=4, passes=2, shuffle=shuffle)
    parts = make_minibatches(rollout, minibatches, row_multiple=2, seed=(1, 2, 0))
    assert len({part["tokens"].shape for part in parts}) == 1
    own = [[int(s["tokens"][0]) for s in unpack(part)] for part in parts]
    assert sorted(i for part in own for i in part) == list(range(41))
    assert {len(part) for part in own} <= {10, 11}
    tokens = [sum(lengths[part]) for part in map(np.array, own)]
    assert max(tokens) - min(tokens) <= 2 * max(lengths)
    again = make_minibatches(rollout, minibatches, row_multiple=2, seed=(1, 2, 0))
    other = make_minibatches(rollout, minibatches, row_multiple=2, seed=(1, 2, 1))
    same = lambda a, b: all(np.array_equal(x["tokens"], y["tokens"]) for x, y in zip(a, b, strict=True))
    assert same(parts, again)
    assert same(parts, other) == (not shuffle)


def test_minibatches_do_not_depend_on_how_sequences_were_packed():
    lengths = np.random.default_rng(4).integers(4, 25, 12)
    examples = [{"tokens": np.full(n, i, np.int32), "loss_mask": np.ones(n, bool)} for i, n in enumerate(lengths)]
    dealt = []
    for row_len, num_shards in ((128, 1), (64, 2), (32, 4)):
        rollout = pack(examples, pack_rows(lengths, row_len, num_shards=num_shards))
        parts = make_minibatches(rollout, Minibatches(count=3), row_multiple=num_shards, seed=(1, 2, 0))
        dealt.append([sorted(int(s["tokens"][0]) for s in unpack(part)) for part in parts])
    assert dealt[0] == dealt[1] == dealt[2]


def test_sequences_without_a_trained_token_are_left_out():
    lengths = [5, 6, 7, 8]
    examples = [
        {"tokens": np.full(n, i, np.int32), "train_mask": np.full(n, i % 2 == 1)} for i, n in enumerate(lengths)
    ]
    rollout = pack(examples, pack_rows(lengths, 32))
    parts = make_minibatches(rollout, Minibatches(count=3), row_multiple=1, seed=(0,))
    assert sorted(int(s["tokens"][0]) for part in parts for s in unpack(part)) == [1, 3]
    nothing = rollout.replace_arrays(train_mask=np.zeros_like(rollout["train_mask"]))
    assert make_minibatches(nothing, Minibatches(count=3), row_multiple=1, seed=(0,)) == []


def test_some_sequences_are_taken_out_of_a_batch_and_their_outputs_put_back():
    rng = np.random.default_rng(0)
    lengths, is_other = [5, 3, 9, 2, 7, 4], np.arange(6) % 2 == 1
    examples = [
        {"tokens": rng.integers(3, 50, n).astype(np.int32), "is_other": np.array(other)}
        for n, other in zip(lengths, is_other, strict=True)
    ]
    batch = pack(examples, pack_rows(lengths, 12))
    chosen = Chosen.of(batch, "is_other", row_multiple=2)
    assert chosen.batch.num_tokens == 3 + 2 + 4 and chosen.batch.num_rows == 2 < batch.num_rows
    back = chosen.put_back(np.asarray(chosen.batch["tokens"]) * 10, batch.num_rows)
    of_tokens = np.pad(batch["is_other"], ((0, 0), (1, 0)))
    expected = np.take_along_axis(of_tokens, batch["segment_ids"], axis=1) * batch["tokens"] * 10
    np.testing.assert_array_equal(back, expected)


def test_rows_come_in_few_numbers():
    """A run meets few shapes, none of which holds more than a third of empty rows."""
    sizes = {bucket_rows(n, 2) for n in range(1, 400)}
    assert len(sizes) < 30
    assert all(n <= bucket_rows(n, 2) <= max(2, n * 4 / 3 + 2) and bucket_rows(n, 2) % 2 == 0 for n in range(1, 400))
