"""What each verifier calls right and wrong, and which rows it refuses before a run begins."""

import importlib.util
from pathlib import Path

import pytest

from realjax.rewards.functions import check_row, load_function, takes_one
from realjax.rewards.verifiers import VERIFIERS

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
RIGHT = {
    "math_reward": [
        ({"answer": "72"}, "48 + 24 = 72 clips, so it is 72."),
        ({"answer": 0.5}, r"The result is $\frac{1}{2}$."),
        ({"answer": r"\frac{\sqrt{3}}{2}"}, r"\boxed{\sqrt{3}/2}"),
        ({"answer": "She sold 24.\n#### 1,000"}, "#### 1000"),
        ({"answer": "$x^2+1$"}, "$1 + x^2$"),
        ({"answer": r"12 \text{ cm}"}, "It is 12 cm long."),
        ({"answer": r"\{1, 2\}"}, r"$\{2, 1\}$"),
    ],
    "exact_reward": [({"answer": "Paris"}, " Paris\n"), ({"answer": ["a b", "c"]}, "a  b"), ({"answer": 3}, "3")],
    "regex_reward": [({"pattern": r"^\s*yes\b.*no$"}, "yes, and\nno"), ({"pattern": "7"}, "1 7 1")],
    "json_reward": [
        ({"schema": SCHEMA}, ' {"n": 3}'),
        ({"schema": '{"type": "array"}'}, "So:\n```json\n[1, 2]\n```\n"),
    ],
    "length_reward": [({"min_words": 2}, "a b"), ({"max_words": 2, "min_words": 1}, " a b "), ({"max_words": 0}, "")],
    "format_reward": [({}, "<think>a\nb</think>\n<answer>7</answer>")],
}
WRONG = {
    "math_reward": [({"answer": "72"}, "It is 71, not 73."), ({"answer": "5"}, ""), ({"answer": "1/3"}, "0.3")],
    "exact_reward": [({"answer": "Paris"}, "In Paris"), ({"answer": ["a", "b"]}, "ab")],
    "regex_reward": [({"pattern": "^yes$"}, "no")],
    "json_reward": [({"schema": SCHEMA}, '{"n": "3"}'), ({"schema": SCHEMA}, "n is 3"), ({"schema": {}}, "")],
    "length_reward": [({"min_words": 2}, "a"), ({"max_words": 2}, "a b c")],
    "format_reward": [
        ({}, "<answer>7</answer>"),
        ({}, "<think>a</think><answer>7</answer> and more"),
        ({}, "<think>a<think>b</think><answer>7</answer>"),
    ],
}
REFUSED = [
    ("math_reward", {}, "no key 'answer'"),
    ("math_reward", {"answer": None}, "found None as answer; math_reward needs a number or LaTeX"),
    ("math_reward", {"answer": "####"}, "math_reward needs a number or LaTeX that math-verify can read"),
    ("exact_reward", {"answer": []}, r"found the answer \[\]"),
    ("regex_reward", {"pattern": "("}, r"found the pattern '\(', which is no regular expression"),
    ("json_reward", {"schema": {"type": "no such"}}, "found a schema that is none"),
    ("json_reward", {"schema": 3}, "found 3 as schema"),
    ("length_reward", {}, "length_reward needs one of them"),
    ("length_reward", {"min_words": 3, "max_words": 2}, "found min_words=3 and max_words=2"),
]
PACKAGES = {"math_reward": "math_verify", "json_reward": "jsonschema"}


def need(name: str) -> None:
    """Skips where the extra of a verifier is not installed."""
    if (package := PACKAGES.get(name)) is not None:
        pytest.importorskip(package)


@pytest.mark.parametrize("name", VERIFIERS)
def test_right_answers_have_1_and_others_0(name):
    need(name)
    fn = load_function(f"realjax.rewards.verifiers:{name}")
    assert takes_one(fn)
    for cases, expected in ((RIGHT[name], 1.0), (WRONG[name], 0.0)):
        for row, answer in cases:
            check_row(fn, row, "line 1", name=name)
            assert fn("a prompt", answer, row) == expected, (row, answer)


def test_a_thought_may_begin_in_the_prompt():
    assert VERIFIERS["format_reward"]("Q? <think>\n", "a</think><answer>b</answer>", {}) == 1.0


@pytest.mark.parametrize(("name", "row", "reason"), REFUSED)
def test_rows_without_what_it_needs_are_refused(name, row, reason):
    need(name)
    with pytest.raises(ValueError, match=f"^line 1: {name} cannot score this row: .*{reason}"):
        check_row(VERIFIERS[name], row, "line 1", name=name)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_extra_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    row = {"answer": "3", "schema": {}}
    with pytest.raises(ValueError, match=rf"{name} needs the package {PACKAGES[name]}, .* 'realjax\[verifiers\]'"):
        check_row(VERIFIERS[name], row, "line 1", name=name)


def test_the_page_has_a_row_for_each():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    for name in VERIFIERS:
        assert f"| `{name}` |" in page
