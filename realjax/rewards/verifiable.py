"""A reward that can be checked: is the number at the end of the answer the right one?

Used as `reward.fn=realjax.rewards.verifiable:number_reward` on rows with the keys `prompt` and `answer`; it is also
the pattern for functions of your own.
"""

import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from realjax.rewards.functions import Row, checks_rows

Number = Decimal | Fraction
MARK = "####"
# Minus signs (the dashes of ranges are none), and full-width and Arabic signs inside numbers, as ASCII has them.
ASCII_SIGNS = str.maketrans("\u2212\uff0d\ufe63\uff0b\uff0e\uff0c\uff0f\u066b\u066c", "---+.,/.,")
SEPARATORS = ",\u00a0\u202f\u2009"  # of thousands: a comma, or a space that does not break
# 1,234 (separators only where they group thousands)  1234  3.50  .5
DIGITS = rf"(?:\d{{1,3}}(?:[{SEPARATORS}]\d{{3}})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?"
# -5  -$5  5e-05  1/2
NUMBER = re.compile(rf"(?<![\w.])([-+]?)[$€£¥]?({DIGITS})(?:([eE][-+]?\d+)(?!\w)|((?:/{DIGITS})*))")


def final_number(text: str) -> Number | None:
    """Returns the first number after the last `####`, or the last one of a text without that mark; None without any.

    It is exact. Units, currencies and percent signs are no part of it: 50% is 50.
    """
    _, mark, tail = text.translate(ASCII_SIGNS).rpartition(MARK)
    numbers = list(_numbers(tail))
    return numbers[0 if mark else -1] if numbers else None


def _numbers(text: str) -> Iterator[Number]:
    """Yields the numbers of a text; a/b is one number, a/b/c (a date) are three."""
    for sign, digits, exponent, rest in NUMBER.findall(text):
        first, *others = (_decimal(part) for part in (sign + digits + exponent, *rest.split("/")[1:]))
        if len(others) == 1 and first is not None and others[0]:
            yield Fraction(first) / Fraction(others[0])
        else:
            yield from (number for number in (first, *others) if number is not None)


def _decimal(digits: str) -> Decimal | None:
    """Returns the number, None for an exponent that is beyond all numbers."""
    try:
        return Decimal(re.sub(f"[{SEPARATORS}]", "", digits))
    except InvalidOperation:
        return None


def reference_number(row: Row) -> Number:
    """Returns the number of a row's `answer`. Raises ValueError where there is none."""
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return Decimal(answer)
    if isinstance(answer, float) and math.isfinite(answer):
        return Decimal(repr(answer))  # as the data spell it: 0.1, not the binary number next to it
    number = final_number(answer) if isinstance(answer, str) else None
    if number is None:
        raise ValueError(f"found the answer {answer!r}; number_reward needs one with a number")
    return number


@checks_rows(reference_number)
def number_reward(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Returns 1 for answers whose final number equals that of the row's `answer`, else 0.

    Raises ValueError for a row without an answer that holds a number.
    """
    return [float(final_number(answer) == reference_number(row)) for answer, row in zip(answers, rows, strict=True)]


def number_vote(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[Number | None]:
    """Returns the final number of each answer: what it votes for as `eval.vote_fn`."""
    return [final_number(answer) for answer in answers]
