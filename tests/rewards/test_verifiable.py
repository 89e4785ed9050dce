"""The final number of a text, and the reward for the right one."""

import json
from decimal import Decimal

import pytest

from realjax.rewards.functions import load_function
from realjax.rewards.verifiable import final_number, number_reward


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
        ("-$5", "-5"),
        ("12/24/2024", "2024"),
        ("3/0", "0"),
        ("1e" + "9" * 30, None),
        ("1e-" + "9" * 30 + " or 2", "2"),
        ("the 2e5f of it", "2"),
        ("one half-5", "5"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_the_reward_compares_numbers_not_texts():
    rows = [{"id": 0, "answer": "so 1,000 #### 1,000"}, {"id": 1, "answer": "5"}, {"id": 2, "answer": 2.5}]
    fn = load_function("realjax.rewards.verifiable:number_reward")
    assert fn is number_reward
    assert fn(["q"] * 3, ["= 1000.0", "about 6", "2.50"], rows) == [1.0, 0.0, 1.0]
    assert fn(["q"], ["I do not know"], rows[:1]) == [0.0]


@pytest.mark.parametrize(
    "spellings",
    [
        ("0.00005", "5e-05", "5E-5", ".00005", "0.000050", "+0.00005", "1/20000"),
        (
            "10000000000000000",
            "1e16",
            "1E+16",
            "10,000,000,000,000,000",
            "1e16.",
            "10\u202f000\u202f000\u202f000\u202f000\u202f000",
        ),
        ("-5", "\u22125", "-5.0", "-5.", "-$5", "-5%", "-5 apples", "\uff0d\uff15", "-10/2"),
        (
            "1234.5",
            "1,234.50",
            "$1,234.50",
            "1234.5 EUR",
            "\uff11,\uff12\uff13\uff14\uff0e\uff15",
            "\u0661\u0662\u0663\u0664\u066b\u0665",
            "2469/2",
        ),
        ("1/3", "2/6", "+1/3", "1/3 of it"),
        ("0", "-0", "0.0", "0e5", "0/7"),
    ],
    ids=lambda spellings: spellings[0],
)
def test_several_spellings_of_one_number_are_one_number(spellings):
    others = ["5", "16", "1", "3", "0.3333333333333333", "-1", "50000", "1000000000000000.1"]
    for reference in spellings:
        rows = [{"answer": f"#### {reference}"}] * len(spellings)
        assert number_reward([""] * len(spellings), [f"so #### {text}" for text in spellings], rows) == [1.0] * len(
            rows
        )
        assert number_reward([""] * len(others), others, rows[:1] * len(others)) == [0.0] * len(others)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("0.00005", "#### 0.00005", "#### 5"),
        ("1e16", "10,000,000,000,000,000", "16"),
        ("-1e-7", "-0.0000001", "-1"),
        ("0.1", "0.10", "0.1000000000000000055511151231257827021181583404541015625"),
        ("12345678901234567890", "12345678901234567890", "12345678901234567891"),
    ],
)
def test_a_bare_json_number_is_the_number_that_the_data_spell(text, right, wrong):
    rows = [{"answer": json.loads(text)}] * 2
    assert number_reward(["", ""], [right, wrong], rows) == [1.0, 0.0]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "q7", "answer": float("nan")},
        {"id": "q7", "answer": True},
        {"id": "q7"},
        {"id": "q7", "answer": "none"},
        {"id": "q7", "answer": None},
    ],
)
def test_a_row_without_a_number_is_an_error(row):
    with pytest.raises(ValueError, match="^found the answer .*; number_reward needs one with a number"):
        number_reward(["q"], ["1"], [row])
