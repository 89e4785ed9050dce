"""Rewards computed from texts: a rollout is decoded, a function of prompts and answers scores it."""

import copy
from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.named import shorten
from realjax.core.segments import segment_slices
from realjax.core.texts import decode_answers, split_answer
from realjax.rewards.failures import Failure, Failures
from realjax.rewards.functions import Question, Row, TextFn, describe_error
from realjax.rewards.scoring import UNASKED, Scorer, run_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_REWARD_INPUTS = ("loss_mask", "prompt_id")


def make_text_reward(
    fn: TextFn | Scorer,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    *,
    name: str,
    failures: Failures | None = None,
    max_failed_share: float = 1.0,
) -> HostFn:
    """Returns the host call that writes `rewards` `[R, S]`: what `fn` says of each sequence's decoded texts.

    `prompt_id` `[R, S]` of the rollout is an index into `rows`. Texts are without special tokens. An answer for which
    there is no number that is finite in float32 has nan, and `failures` are told why: `fn` raised, took too long, or
    returned something else. It is not asked about answers that have failed before (`env_failed`), nor about others once
    more than a share of them has no reward, which ends the run.
    """
    failures, scorer = failures or Failures(), fn if isinstance(fn, Scorer) else Scorer(fn, partial(run_here, fn))

    def reward(arrays: Arrays, state: State) -> HostResult:
        rewards = np.zeros(arrays["prompt_id"].shape, np.float32)
        places, prompts, answers, found = read_rollout(arrays, tokenizer, rows)
        most_failed = int(max_failed_share * len(places))
        question = Question(prompts=prompts, answers=answers, rows=found)
        if (lost := arrays.get("env_failed")) is not None:
            left = [i for i, place in enumerate(places) if not lost[place]]
            most_failed = max(0, most_failed - (len(places) - len(left)))
            places, question = [places[i] for i in left], question.pick(left)
        told = []
        outcomes = scorer.score(question, most_failed)
        for place, answer, row, outcome in zip(places, question.answers, question.rows, outcomes, strict=True):
            rewards[place] = np.nan if isinstance(outcome, str) else outcome
            if isinstance(outcome, str) and outcome is not UNASKED:
                title = _name_row(int(arrays["prompt_id"][place]), row)
                told.append(Failure(answer=answer, row=title, reason=outcome))
        failures.tell(name, told)
        return HostResult(arrays={"rewards": rewards})

    return reward


def gather_text_rewards(fns: Sequence[HostFn], key: str) -> HostFn:
    """Returns the host call that writes `key` `[R, S, n]`: the rewards of n others, one after the other."""

    def gather(arrays: Arrays, state: State) -> HostResult:
        return HostResult(arrays={key: np.stack([fn(arrays, {}).arrays["rewards"] for fn in fns], axis=-1)})

    return gather


def read_text_reward(key: str, number: int) -> HostFn:
    """Returns the host call whose `rewards` are those of one of the n that `gather_text_rewards` put in `key`."""
    return lambda arrays, state: HostResult(arrays={"rewards": arrays[key][..., number]})


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
        raise RuntimeError(f"{name}: {describe_error(error)}") from error
    if len(votes) != len(answers) or not all(isinstance(vote, Hashable) for vote in votes):
        raise ValueError(
            f"{name}: it returned {shorten(votes)}; it needs to return one text, number or None for each of "
            f"{len(answers)} answers"
        )
    return votes
