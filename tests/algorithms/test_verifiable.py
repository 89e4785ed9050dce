"""The final number of a text, and the reward for the right one."""

from decimal import Decimal

import pytest

from realjax.algorithms.text_rewards import load_function
from realjax.algorithms.verifiable import final_number, number_reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 and 4 are 7", "7"),
        ("it is 7.", "7"),
        ("7 of 9 #### 12 apples, not 13", "12"),
        ("#### 1\n#### 2", "2"),
        ("####5", "5"),
        ("#### -5", "-5"),
        ("a cost of $1,234.50", "1234.5"),
        ("12,345,678", "12345678"),
        ("either 12,34", "34"),
        ("between 10-20", "20"),
        ("x = .5", "0.5"),
        ("7.50", "7.5"),
        ("+3", "3"),
        ("10kg of model v2", "10"),
        ("no number", None),
        ("7 ####", None),
        ("", None),
        ("1" * 6000, "1" * 6000),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_the_reward_compares_numbers_not_texts():
    rows = [{"id": 0, "answer": "so 1,000 #### 1,000"}, {"id": 1, "answer": "5"}, {"id": 2, "answer": 2.5}]
    fn = load_function("realjax.algorithms.verifiable:number_reward")
    assert fn is number_reward
    assert fn(["q"] * 3, ["= 1000.0", "about 6", "2.50"], rows) == [1.0, 0.0, 1.0]
    assert fn(["q"], ["I do not know"], rows[:1]) == [0.0]


@pytest.mark.parametrize("row", [{"id": "q7"}, {"id": "q7", "answer": "none"}, {"id": "q7", "answer": None}])
def test_a_row_without_a_number_is_an_error(row):
    with pytest.raises(ValueError, match="row 'q7': found the answer .*; number_reward needs one with a number"):
        number_reward(["q"], ["1"], [row])
