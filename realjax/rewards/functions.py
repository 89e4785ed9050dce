"""Functions of a user that score answers: how they are found, asked, and what they may return. Imports no JAX: the
processes that only score answers read this.
"""

import asyncio
import copy
import inspect
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from realjax.core.json_text import JsonObject
from realjax.core.named import load_named, shorten

Row = JsonObject
# fn(prompts, answers, rows) -> one number for each answer, or fn(prompt, answer, row) -> one number. `rows` are the
# data's own, with all their keys. Where it is `async def`, what it returns is awaited.
TextFn = Callable[..., Any]

CheckFn = Callable[[Row], object]
Fn = TypeVar("Fn", bound=Callable)
CHECK = "check_row"
ONE_ANSWER = "answer"  # the second parameter of functions of one answer


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a function is asked in a call: answers that have no reward yet."""

    prompts: Sequence[str]
    answers: Sequence[str]
    rows: Sequence[Row]

    def pick(self, places: Sequence[int]) -> "Question":
        """Returns the question about some of the answers."""
        take = lambda values: [values[i] for i in places]
        return Question(prompts=take(self.prompts), answers=take(self.answers), rows=take(self.rows))


@dataclass(frozen=True)
class Fault:
    """Why a call has no rewards, in a line."""

    reason: str
    is_final: bool = False  # to ask again is of no use


Reply = list[float] | Fault  # the number of each answer, nan for None


def takes_one(fn: TextFn) -> bool:
    """Returns whether a function is one of (prompt, answer, row), which it says by its second parameter's name."""
    try:
        names = list(inspect.signature(fn).parameters)
    except ValueError:  # some functions in C have none to be looked at
        return False
    return names[1:2] == [ONE_ANSWER]


def is_async(fn: TextFn) -> bool:
    """Returns whether what a function returns is to be awaited."""
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)


def ask(fn: TextFn, question: Question) -> Any:
    """Returns what a function returns for a question, an awaitable of one that is async."""
    # Copies: what the function does to its arguments is not done to the data, nor to another reward's.
    rows = copy.deepcopy(list(question.rows))
    if takes_one(fn):
        ((prompt, answer, row),) = zip(question.prompts, question.answers, rows, strict=True)
        return fn(prompt, answer, row)
    return fn(list(question.prompts), list(question.answers), rows)


async def await_reply(fn: TextFn, found: Awaitable[Any], num_answers: int) -> Reply:
    """Returns the reply of an async function that was asked."""
    try:
        return read_reply(fn, await found, num_answers)
    except (Exception, SystemExit) as error:
        return Fault(describe_error(error))


def find_reply(fn: TextFn, question: Question) -> Reply:
    """Returns a function's reply to a question, of one that is async when it is there."""
    num_answers = len(question.answers)
    try:
        found = ask(fn, question)
    except (Exception, SystemExit) as error:
        return Fault(describe_error(error))
    return asyncio.run(await_reply(fn, found, num_answers)) if is_async(fn) else read_reply(fn, found, num_answers)


def read_reply(fn: TextFn, found: Any, num_answers: int) -> Reply:
    """Returns what a function has returned as numbers, or why it is none."""
    one = takes_one(fn)
    needed = f"it needs to return {'a number' if one else f'one number for each of {num_answers} answers'}"
    refusal = Fault(f"it returned {shorten(found)}; {needed}", is_final=True)
    try:
        values = np.asarray([found] if one else found)
        if values.dtype.kind not in "biufO":
            return refusal
        values = values.astype(np.float64)
    except Exception:  # what a value's own conversion raises
        return refusal
    if values.shape != (num_answers,):
        return Fault(f"it returned {shorten(found)}, of shape {list(values.shape)}; {needed}", is_final=True)
    return values.tolist()


def describe_error(error: BaseException) -> str:
    """Returns an error of a user's function: that it was raised, what, and in which line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f", in line {frames[-1].lineno} of {frames[-1].name}" if frames else ""
    return f"it raised {type(error).__name__}: {error}{place}"


def load_function(path: str, name: str = "reward.fn") -> TextFn:
    """Returns the function at `module:function`; ValueError, naming the option `name`, when it is not there."""
    example = "<module>:<function>, such as realjax.rewards.verifiable:number_reward"
    fn = load_named(path, name, example)
    if not isinstance(fn, Callable):
        has = "has no such name" if fn is None else f"has it as a {type(fn).__name__}"
        raise ValueError(
            f"{name}: {path!r} is no function: {path.partition(':')[0]} {has}; it needs a function of (prompts, "
            "answers, rows)"
        )
    _check_signature(fn, path, name)
    return fn


def checks_rows(check: CheckFn) -> Callable[[Fn], Fn]:
    """Returns a decorator of a reward function: before a run, `check(row)` raises for a row that it cannot score.

    It is the function's attribute `check_row`, which a module without realjax may set itself.
    """

    def mark(fn: Fn) -> Fn:
        vars(fn)[CHECK] = check
        return fn

    return mark


def check_row(fn: TextFn, row: Row, subject: str, *, name: str) -> None:
    """Raises ValueError, naming `subject` and the option `name`, for a row that the function says it cannot score."""
    check: CheckFn | None = getattr(fn, CHECK, None)
    if check is None:
        return
    try:
        check(copy.deepcopy(row))
    except (Exception, SystemExit) as error:
        found = f"no key {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"{subject}: {name} cannot score this row: {found}; mend the row, or remove it") from error


def _check_signature(fn: TextFn, path: str, name: str) -> None:
    try:
        signature = inspect.signature(fn)
    except ValueError:  # some functions in C have none to be looked at
        return
    try:
        signature.bind((), (), ())
    except TypeError as error:
        raise ValueError(
            f"{name}: {path!r} takes {signature} ({error}); it needs a function of (prompts, answers, rows)"
        ) from error
