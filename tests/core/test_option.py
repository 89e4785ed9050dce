"""Ranges of options: declared once, checked and told alike."""

import math
from dataclasses import dataclass, fields

import pytest

from realjax.core.option import MOST, Range, check_conditions, check_ranges, option


@dataclass(frozen=True)
class Sizes:
    count: int = option(1, "how many", at_least=1, at_most=100)
    share: float = option(0.5, "a part", at_least=0, below=1)
    limit: float | None = option(None, "what stops it", above=0)
    free: int = option(0, "no range of its own")
    flag: bool = option(False, "no number")

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"count": 0}, "count: found 0; it must be at least 1"),
        ({"count": 101}, "count: found 101; it must be at most 100"),
        ({"share": 1.0}, r"share: found 1.0; it must be in \[0, 1\)"),
        ({"share": -0.1}, r"share: found -0.1; it must be in \[0, 1\)"),
        ({"share": math.nan}, r"share: found nan; it must be in \[0, 1\)"),
        ({"limit": 0.0}, "limit: found 0.0; it must be above 0, or null"),
        ({"free": MOST + 1}, f"free: found {MOST + 1}; it must be at most {MOST}"),
    ],
)
def test_a_value_outside_is_told_with_what_is_needed(changes, needed):
    with pytest.raises(ValueError, match=f"^{needed}$"):
        Sizes(**changes)


def test_values_on_the_edge_are_taken_where_the_edge_is_in_the_range():
    Sizes(count=1, share=0.0, limit=1e-30, free=-MOST, flag=True)
    Sizes(count=100, share=0.999, limit=None, free=MOST)


def test_a_range_is_told_as_it_is_declared():
    told = {field.name: str(field.metadata["range"]) for field in fields(Sizes)}
    assert told == {"count": "in [1, 100]", "share": "in [0, 1)", "limit": "above 0", "free": "", "flag": ""}
    assert str(Range(at_most=3)) == "at most 3" and str(Range(above=0, at_most=2)) == "in (0, 2]"


def test_a_condition_over_several_options_names_the_first_that_fails():
    with pytest.raises(ValueError, match="^share: found 0.5; it must be 0 without a limit$"):
        check_conditions(Sizes(), count=(True, "never told"), share=(False, "0 without a limit"))
