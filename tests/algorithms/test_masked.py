import numpy as np
import pytest

from realjax.algorithms.masked import sum_by_segment


@pytest.mark.parametrize("num_segments", [4, 7, 30])
def test_sums_are_those_of_a_loop_and_leave_padding_out(num_segments):
    rng = np.random.default_rng(num_segments)
    segment_ids = np.sort(rng.integers(0, 5, (6, 20)), axis=1)[:, ::-1].astype(np.int32)
    values = rng.standard_normal((6, 20)).astype(np.float32)
    expected = [[row[ids == s].sum() for s in range(1, num_segments + 1)] for row, ids in zip(values, segment_ids)]
    np.testing.assert_allclose(sum_by_segment(values, segment_ids, num_segments), expected, atol=1e-5)
