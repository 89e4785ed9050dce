"""Rewards computed from texts: a rollout is decoded, a function of prompts and answers scores it."""

import copy
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.json_text import JsonObject
from realjax.core.named import load_named
from realjax.core.segments import segment_slices
from realjax.core.texts import decode_answers, split_answer
from realjax.rewards.failures import Failure, Failures, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = JsonObject
# fn(prompts, answers, rows) -> one number for each answer. `rows` are the data's own rows, with all their keys.
TextFn = Callable[[Sequence[str], Sequence[str], Sequence[Row]], Sequence[float]]

CheckFn = Callable[[Row], object]
Fn = TypeVar("Fn", bound=Callable)
CHECK = "check_row"

TEXT_REWARD_INPUTS = ("loss_mask", "prompt_id")


def make_text_reward(
    fn: TextFn,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    *,
    name: str,
    failures: Failures | None = None,
) -> HostFn:
    """Returns the host call that writes `rewards` `[R, S]`: what `fn` says of each sequence's decoded texts.

    `prompt_id` `[R, S]` of the rollout is an index into `rows`. Texts are without special tokens. In a run of several
    processes each of them calls `fn`, which has to give all of them the same. An answer for which it returns nan, None
    or what is not finite in float32 has nan, which `failures` are told. The call raises, saying `name`: RuntimeError
    when `fn` raises or exits, ValueError when it returns anything but one number for each answer.
    """
    failures = Failures() if failures is None else failures

    def reward(arrays: Arrays, state: State) -> HostResult:
        rewards = np.zeros(arrays["prompt_id"].shape, np.float32)
        places, prompts, answers, found = read_rollout(arrays, tokenizer, rows)
        values = _checked_call(fn, name, prompts, answers, found)
        is_bad = ~(np.abs(values) <= np.finfo(np.float32).max)
        of_data = arrays["prompt_id"][tuple(np.array(places).T)]
        failures.tell(
            name,
            [
                Failure(answer=answers[i], row=_name_row(int(of_data[i]), found[i]), reason=f"it returned {values[i]}")
                for i in np.flatnonzero(is_bad)
            ],
        )
        rewards[tuple(np.array(places).T)] = np.where(is_bad, np.nan, values)
        return HostResult(arrays={"rewards": rewards})

    return reward


def _name_row(number: int, row: Row) -> str:
    return f"row {number}" + (f" (id {row['id']})" if "id" in row else "")


def read_rollout(
    arrays: Arrays, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]
) -> tuple[list[tuple[int, int]], list[str], list[str], list[Row]]:
    """Returns (row, column) of each sequence, row by row, the texts of its prompt and of its answer, and its data."""
    places, prompts, answers = [], [], []
    for row, segment, own in segment_slices(arrays["segment_ids"]):
        tokens, is_answer = arrays["tokens"][row, own], arrays["loss_mask"][row, own]
        places.append((row, segment))
        prompt, answer = split_answer(tokens, is_answer)
        prompts.append(prompt)
        answers.append(answer)
    found = [rows[int(arrays["prompt_id"][place])] for place in places]
    return places, *decode_answers(tokenizer, prompts, answers), found


def call_votes(
    fn: TextFn, name: str, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]
) -> list[Hashable]:
    """Returns what each answer votes for; RuntimeError, saying `name`, where the function raises, and ValueError where
    it does not return one vote that can be compared for each answer.
    """
    try:
        votes: list[Any] = list(fn(list(prompts), list(answers), copy.deepcopy(list(rows))))
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"{name}: it raised {_describe(error)}") from error
    if len(votes) != len(answers) or not all(isinstance(vote, Hashable) for vote in votes):
        raise ValueError(
            f"{name}: it returned {shorten(votes)}; it needs to return one text, number or None for each of "
            f"{len(answers)} answers"
        )
    return votes


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


def _checked_call(
    fn: TextFn, name: str, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Row]
) -> np.ndarray:
    """Returns the rewards `[N]` in float64, nan where there is None."""
    try:
        # Copies: what the function does to its arguments is not done to the data, nor to another reward's.
        found = fn(list(prompts), list(answers), copy.deepcopy(list(rows)))
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"{name}: it raised {_describe(error)}") from error
    needed = f"it needs to return one number for each of {len(answers)} answers"
    try:
        values = np.asarray(found)
        if values.dtype.kind not in "biufO":
            raise TypeError(f"{values.dtype} is no number")
        values = values.astype(np.float64)
    except Exception as error:
        raise ValueError(f"{name}: it returned {shorten(found)}; {needed}") from error
    if values.shape != (len(answers),):
        raise ValueError(f"{name}: it returned {shorten(found)}, of shape {list(values.shape)}; {needed}")
    return values


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
