import numpy as np
import pytest

from realjax.algorithms.groups import Groups

EXISTS = np.array([[True, True, False], [True, True, True], [False, False, False]])
GROUP = np.array([[7, 3, 0], [3, 3, 9], [0, 0, 0]])
VALUES = np.array([[1.0, 2.0, np.nan], [4.0, 6.0, -1.0], [np.nan, np.nan, np.nan]])


def test_statistics_are_those_of_each_prompts_sequences():
    groups = Groups.of(GROUP, EXISTS)
    three, clean = np.array([2.0, 4.0, 6.0]), np.where(EXISTS, VALUES, 0)
    m, s = three.mean(), three.std(ddof=1)
    np.testing.assert_array_equal(groups.sizes, [[1, 3, 0], [3, 3, 1], [0, 0, 0]])
    np.testing.assert_allclose(groups.sum(VALUES), [[1, 12, 0], [12, 12, -1], [0, 0, 0]])
    np.testing.assert_allclose(groups.mean(VALUES), [[1, m, 0], [m, m, -1], [0, 0, 0]])
    np.testing.assert_allclose(groups.std(clean), [[0, s, 0], [s, s, 0], [0, 0, 0]])
    np.testing.assert_array_equal(groups.is_uniform(VALUES), [[True, False, False], [False, False, True], [False] * 3])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 0.1])
def test_equal_values_are_uniform_whatever_their_mean_rounds_to(value):
    groups = Groups.of(np.zeros((1, 7), int), np.ones((1, 7), bool))
    assert groups.is_uniform(np.full((1, 7), value)).all()


def test_no_sequence_at_all():
    groups = Groups.of(GROUP, np.zeros_like(EXISTS))
    assert not groups.mean(VALUES).any() and not groups.is_uniform(VALUES).any()
