"""What the edges of segments give, compared with loops over the sequences of random packed rows."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.segments import (
    last_token_mask,
    move_to_next,
    move_to_previous,
    segment_mask,
    segment_slices,
    spread_to_tokens,
    sum_by_segment,
)

R, T, S = 7, 20, 20


def random_rows(seed: int) -> tuple[np.ndarray, list[tuple[int, int, slice]]]:
    """Returns segment ids, a full row and an empty one among them, and where each sequence is."""
    rng = np.random.default_rng(seed)
    segment_ids, places = np.zeros((R, T), np.int32), []
    for row in range(R - 1):
        start, segment = 0, 0
        while start < T and (row == 0 or rng.random() < 0.8):
            end = min(T, start + int(rng.integers(1, 7)))
            segment_ids[row, start:end] = segment + 1
            places.append((row, segment, slice(start, end)))
            start, segment = end, segment + 1
    return segment_ids, places


@pytest.fixture(params=range(5))
def rows(request):
    return random_rows(request.param)


@pytest.fixture(params=[np, jnp], ids=["numpy", "jax"])
def namespace(request):
    return request.param


def draw_values(seed: int, shape: tuple[int, int] = (R, T)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_sequences_are_found_from_the_left(rows):
    segment_ids, places = rows
    assert list(segment_slices(segment_ids)) == places
    exists = np.zeros((R, S), bool)
    for row, segment, _ in places:
        exists[row, segment] = True
    np.testing.assert_array_equal(segment_mask(segment_ids, S), exists)


def test_every_sequence_has_one_last_token(rows, namespace):
    segment_ids, places = rows
    expected = np.zeros((R, T), bool)
    for row, _, tokens in places:
        expected[row, tokens.stop - 1] = True
    np.testing.assert_array_equal(last_token_mask(namespace.asarray(segment_ids)), expected)


def test_values_move_along_their_sequence_and_no_further(rows, namespace):
    segment_ids, places = rows
    values, to_next, to_previous = draw_values(0), np.zeros((R, T)), np.zeros((R, T))
    for row, _, tokens in places:
        to_next[row, tokens][1:] = values[row, tokens][:-1]
        to_previous[row, tokens][:-1] = values[row, tokens][1:]
    for move, expected in ((move_to_next, to_next), (move_to_previous, to_previous)):
        moved = move(namespace.asarray(values), namespace.asarray(segment_ids))
        assert isinstance(moved, type(namespace.asarray(values))) and moved.dtype == np.float32
        np.testing.assert_array_equal(moved, expected)


def test_both_moves_are_adjoint(rows):
    segment_ids, _ = rows
    x, y = draw_values(1), draw_values(2)
    forth, back = move_to_next(x, segment_ids) * y, x * move_to_previous(y, segment_ids)
    assert float(forth.sum()) == pytest.approx(float(back.sum()), rel=1e-4)


def test_spreading_is_the_adjoint_of_summing(rows, namespace):
    segment_ids, places = rows
    values, numbers = draw_values(3), draw_values(4, (R, S))
    sums, spread = np.zeros((R, S), np.float32), np.zeros((R, T), np.float32)
    for row, segment, tokens in places:
        sums[row, segment] = values[row, tokens].sum()
        spread[row, tokens] = numbers[row, segment]
    take = partial(spread_to_tokens, segment_ids=namespace.asarray(segment_ids))
    np.testing.assert_array_equal(take(namespace.asarray(numbers)), spread)
    for num_segments in (S, S + 3):
        padded = np.pad(sums, ((0, 0), (0, num_segments - S)))
        found = sum_by_segment(jnp.asarray(values), jnp.asarray(segment_ids), num_segments)
        np.testing.assert_allclose(found, padded, atol=1e-5)
