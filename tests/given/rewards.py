"""Reward functions of tests, as a user would write them."""

import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Sequence

from realjax.rewards.functions import Row


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


def troubled(prompt: str, answer: str, row: Row) -> float | None:
    """Does what the row's `does` says: sleeps, raises, exits, dies, or returns nan or nothing; else gives a length."""
    does = row.get("does")
    if does == "sleep":
        time.sleep(3600)
    if does == "raise":
        raise KeyError("no such thing")
    if does == "exit":
        sys.exit(3)
    if does == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"nan": math.nan, "none": None}.get(str(does), float(len(answer)))


def troubled_lists(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
    """Returns what `troubled` does, for lists."""
    return [troubled(*one) for one in zip(prompts, answers, rows, strict=True)]


async def troubled_async(prompt: str, answer: str, row: Row) -> float | None:
    """Returns what `troubled` does after a moment, without keeping others from theirs."""
    await asyncio.sleep(3600 if row.get("does") == "sleep" else 0.02)
    return troubled(prompt, answer, row)


async def troubled_async_lists(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]) -> list:
    """Returns what `troubled_async` does, for lists."""
    return [await troubled_async(*one) for one in zip(prompts, answers, rows, strict=True)]


def tell_process(prompt: str, answer: str, row: Row) -> float:
    """Returns the process's number; fails where it has JAX, or sees a device."""
    assert "jax" not in sys.modules and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    return float(os.getpid())


def flaky(prompt: str, answer: str, row: Row) -> float:
    """Raises the first time that it is asked about a row, of which the file `seen` keeps a record."""
    with open(row["seen"], "a+") as file:
        file.seek(0)
        if answer not in file.read().split():
            file.write(f"{answer}\n")
            raise RuntimeError("not yet")
    return 1.0


def troubled_by_id(prompt: str, answer: str, row: Row) -> float | None:
    """Returns what `troubled` does, whose trouble every fourth row has in turn; the reward of others is `oddness`."""
    number = int(row["id"])
    does = ("sleep", "raise", "nan")[number // 4 % 3] if number % 4 == 0 else ""
    return troubled(prompt, answer, {"does": does}) if does else float(len(answer) % 2)
