"""Rows on their way come back as they were, whatever there is of them."""

from dataclasses import replace

import numpy as np
import pytest

from realjax.engine.batching import Generation, Request
from realjax.runtime.flight import Row, dump_rows, flatten_rows, join_rows, load_rows


def make_answer(num_tokens: int, num_prompt: int, rng: np.random.Generator, **changes) -> Generation:
    answer = Generation(
        tokens=rng.integers(0, 99, num_tokens).astype(np.int32),
        logprobs=-rng.random(num_tokens).astype(np.float32),
        ended=bool(rng.integers(2)),
        kept=rng.integers(0, 99, (num_tokens, 3)).astype(np.uint32),
        routes=rng.integers(0, 9, (num_prompt + num_tokens, 2)).astype(np.int32),
    )
    return replace(answer, **changes)


def make_rows(**changes) -> list[Row]:
    """Returns one that waits, one that was begun by two versions, one that is finished, and a greedy one."""
    rng = np.random.default_rng(3)
    requests = [
        Request(tokens=rng.integers(0, 99, n).astype(np.int32), row_id=i, sample_id=7 * i, is_greedy=i == 3)
        for i, n in enumerate((4, 2, 5, 3))
    ]
    rows = [Row(step=9 + i, request=request) for i, request in enumerate(requests)]
    begun = replace(requests[1], begun=make_answer(2, 2, rng, ended=False, **changes))
    rows[1] = rows[1].interrupted(begun, version=8)
    begun = replace(requests[1], begun=make_answer(5, 2, rng, ended=False, **changes))
    rows[1] = rows[1].interrupted(begun, version=9)
    rows[2] = rows[2].finished(make_answer(6, 5, rng, **changes), version=9)
    rows[3] = rows[3].finished(make_answer(1, 3, rng, **changes), version=10)
    return rows


def assert_same_rows(found: list[Row], expected: list[Row]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("row_id", "sample_id", "is_greedy"):
            assert getattr(ours.request, name) == getattr(theirs.request, name)
        assert (ours.step, ours.generation is None) == (theirs.step, theirs.generation is None)
        np.testing.assert_array_equal(ours.request.tokens, theirs.request.tokens)
        np.testing.assert_array_equal(ours.versions, theirs.versions)
        assert (ours.answer is None) == (theirs.answer is None)
        if ours.answer is not None and theirs.answer is not None:
            assert ours.answer.ended == theirs.answer.ended
            for name in ("tokens", "logprobs", "kept", "routes"):
                a, b = getattr(ours.answer, name), getattr(theirs.answer, name)
                assert (a is None) == (b is None)
                if b is not None:
                    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("changes", [{}, {"kept": None}, {"kept": None, "routes": None}], ids=str)
def test_rows_come_back_as_they_were(changes):
    rows = make_rows(**changes)
    assert_same_rows(join_rows(flatten_rows(rows)), rows)
    assert_same_rows(load_rows(dump_rows(rows)), rows)
    # Orbax saves no empty array.
    assert all(array.size for array in flatten_rows(rows[:1]).values())
    assert_same_rows(join_rows(flatten_rows(rows[:1])), rows[:1])
    assert flatten_rows([]) == {} and join_rows({}) == []


def test_each_token_has_the_version_that_drew_it():
    waiting, begun, finished, greedy = make_rows()
    assert waiting.versions.size == 0 and waiting.interrupted(waiting.request, 4).versions.size == 0
    assert begun.versions.tolist() == [8, 8, 9, 9, 9] and begun.ages.tolist() == [2, 2, 1, 1, 1]
    assert finished.versions.tolist() == [9] * 6 and greedy.versions.tolist() == [10]
    rng = np.random.default_rng(0)
    assert begun.finished(make_answer(7, 2, rng), 10).versions.tolist() == [8, 8, 9, 9, 9, 10, 10]
