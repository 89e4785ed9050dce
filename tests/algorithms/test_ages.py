"""How old tokens are, and which responses were interrupted."""

import numpy as np
import pytest

from realjax.algorithms.ages import measure_ages
from realjax.core.metrics import summarize


def test_ages_are_those_of_response_tokens():
    arrays = {
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]]),
        "loss_mask": np.array([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0]], bool),
        # Of padding and prompts nothing counts.
        "token_age": np.array([[9, 1, 1, 9, 3, 2, 2, 9], [9, 9, 0, 0, 0, 9, 9, 9]]),
        "has_eos": np.ones((2, 2), bool),
    }
    (found,) = [summarize([measure_ages(arrays, {}).metrics])]
    assert found["token_age"] == pytest.approx(9 / 8) and found["max_token_age"] == 3
    assert found["interrupted_share"] == pytest.approx(1 / 3)
