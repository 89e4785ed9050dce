import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.masked import move_to_next, sum_by_segment


@pytest.mark.parametrize("num_segments", [4, 7, 30])
def test_sums_are_those_of_a_loop_and_leave_padding_out(num_segments):
    rng = np.random.default_rng(num_segments)
    segment_ids = np.sort(rng.integers(0, 5, (6, 20)), axis=1)[:, ::-1].astype(np.int32)
    values = rng.standard_normal((6, 20)).astype(np.float32)
    expected = [[row[ids == s].sum() for s in range(1, num_segments + 1)] for row, ids in zip(values, segment_ids)]
    np.testing.assert_allclose(sum_by_segment(values, segment_ids, num_segments), expected, atol=1e-5)


@pytest.mark.parametrize("namespace", [np, jnp])
def test_values_move_onto_the_next_token_of_their_sequence(namespace):
    segment_ids = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [0] * 8], np.int32)
    values = namespace.asarray(np.arange(1, 25, dtype=np.float32).reshape(3, 8))
    moved = move_to_next(values, segment_ids)
    assert isinstance(moved, type(values))
    np.testing.assert_array_equal(
        moved, [[0, 1, 2, 0, 0, 5, 0, 0], [0, 0, 10, 11, 12, 13, 14, 15], [0, 0, 0, 0, 0, 0, 0, 0]]
    )
