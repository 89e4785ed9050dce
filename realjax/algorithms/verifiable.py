"""A reward that can be checked: is the number at the end of the answer the right one?

Used as `reward.fn=realjax.algorithms.verifiable:number_reward` on rows with the keys `prompt` and `answer`; it is also
the pattern for functions of your own.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

from realjax.algorithms.text_rewards import Row

MARK = "####"
# 1,234 (commas only where they group thousands)  -5  3.50  .5
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?")


def number_reward(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Returns 1 for answers whose final number equals that of the row's `answer`, else 0.

    Raises ValueError for a row without an answer that holds a number.
    """
    return [float(final_number(answer) == _reference(row)) for answer, row in zip(answers, rows, strict=True)]


def final_number(text: str) -> Decimal | None:
    """Returns the first number after the last `####`, or the last one of a text without that mark; None without any."""
    _, mark, tail = text.rpartition(MARK)
    found = NUMBER.findall(tail)
    return Decimal(found[0 if mark else -1].replace(",", "")) if found else None


def _reference(row: Row) -> Decimal:
    answer = row.get("answer")
    # Data often hold the bare number, not a text.
    number = final_number(str(answer)) if isinstance(answer, str | int | float) else None
    if number is None:
        raise ValueError(f"row {row.get('id')!r}: found the answer {answer!r}; number_reward needs one with a number")
    return number
