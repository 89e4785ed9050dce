"""Reward functions of tests, as a user would write them."""

from collections.abc import Sequence

from realjax.rewards.text import Row


def shortness(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Returns more for shorter answers."""
    return [-len(answer) / 100 for answer in answers]


def sameness(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Returns the same for all answers to a prompt, from its row of the data."""
    return [float(row["id"]) for row in rows]


def first_letter(prompts, answers, rows):
    """What an answer votes for."""
    return [answer.strip()[:1] or None for answer in answers]


def oddness(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Returns 1 for answers of an odd number of characters, else 0."""
    return [float(len(answer) % 2) for answer in answers]
