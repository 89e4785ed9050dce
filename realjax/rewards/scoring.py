"""How a function is asked about a step's answers: in this process, awaited, or in processes of its own."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from realjax.core.option import option
from realjax.rewards.functions import (
    Fault,
    Question,
    Reply,
    TextFn,
    ask,
    await_reply,
    describe_error,
    find_reply,
    is_async,
    takes_one,
)
from realjax.rewards.workers import Workers

LARGEST = float(np.finfo(np.float32).max)
Outcome = float | str  # an answer's reward, or why it has none
UNASKED = "it was not asked: too many other answers have no reward"


@dataclass(frozen=True, kw_only=True)
class ScoringParameters:
    """Where a reward function runs, and how long it may take."""

    workers: int = option(
        0, "processes that run fn, away from the accelerators; 0: a thread of the run", at_least=0, at_most=4096
    )
    timeout_s: float | None = option(
        None,
        "seconds that fn may take for an answer, in workers or as `async def`; an answer that takes longer is left out",
        above=0,
    )
    retries: int = option(
        1, "times that fn is asked again about an answer, after an error or too long a time", at_least=0, at_most=100
    )
    batch_size: int | None = option(
        None, "answers that a fn of lists is given at once; null: in workers one, else all of a step", at_least=1
    )
    concurrency: int = option(64, "calls of an `async def` fn that are under way at once", at_least=1, at_most=2**16)


class RunFn(Protocol):
    """Gives the reply to each question, in their order; None to those that were not asked."""

    def __call__(self, questions: Sequence[Question], most_faults: int | None = None) -> Sequence[Reply | None]:
        """Asks; after more than `most_faults` faults no further question."""
        ...


class Scorer:
    """A function, and how it is asked. Not for several threads at once."""

    def __init__(self, fn: TextFn, run_fn: RunFn, *, retries: int = 0, size: int | None = None) -> None:
        """`size` is how many answers a call may be about; None: all."""
        self.fn, self.run_fn, self.retries, self.size = fn, run_fn, retries, 1 if takes_one(fn) else size

    def score(self, question: Question, most_failed: int | None = None) -> list[Outcome]:
        """Returns each answer's reward, finite in float32, or why it has none.

        A call about several answers that raises or takes too long is made again for each of them alone. When more than
        `most_failed` answers have no reward, the others are not asked about any more.
        """
        count = len(question.answers)
        outcomes: list[Outcome] = [UNASKED] * count
        size = self.size or max(count, 1)
        # Places of answers that are asked about together, and how often they were before.
        todo = [(range(first, min(first + size, count)), 0) for first in range(0, count, size)]
        num_failed = 0  # for good
        while todo and (most_failed is None or num_failed <= most_failed):
            most_faults = None if most_failed is None else most_failed - num_failed
            replies = self.run_fn([question.pick(piece) for piece, _ in todo], most_faults)
            again, later = list[tuple[range, int]](), list[tuple[range, int]]()
            for (piece, tries), reply in zip(todo, replies, strict=True):
                if reply is None:
                    later.append((piece, tries))
                    continue
                is_fault = isinstance(reply, Fault)
                for i, place in enumerate(piece):
                    outcomes[place] = reply.reason if is_fault else _judge(reply[i])
                if is_fault and not reply.is_final and tries < self.retries + (size > 1):
                    again += [(range(place, place + 1), tries + 1) for place in piece]
                else:
                    num_failed += sum(isinstance(outcomes[place], str) for place in piece)
            # What failed comes first: whether it does so for good may be all that is to be known.
            todo = [*again, *later]
        return outcomes


def _judge(reward: float) -> Outcome:
    return reward if abs(reward) <= LARGEST else f"it returned {reward}"


def make_scorer(fn: TextFn, parameters: ScoringParameters, *, path: str, name: str) -> Scorer:
    """Returns how the function at `path`, which the option `name` gives, is asked."""
    size = parameters.batch_size or (1 if parameters.workers else None)
    if parameters.workers:
        run_fn = Workers(path, name, count=parameters.workers, timeout_s=parameters.timeout_s).run
    elif is_async(fn):
        run_fn = Awaiting(fn, parameters.concurrency, parameters.timeout_s).run
    else:
        run_fn = partial(run_here, fn)
    return Scorer(fn, run_fn, retries=parameters.retries, size=size)


def run_here(fn: TextFn, questions: Sequence[Question], most_faults: int | None = None) -> list[Reply | None]:
    """Returns a function's reply to each question, asked in this thread one after the other; see `RunFn`."""
    replies, num_faults = list[Reply | None](), 0
    for question in questions:
        is_over = most_faults is not None and num_faults > most_faults
        replies.append(None if is_over else find_reply(fn, question))
        num_faults += isinstance(replies[-1], Fault)
    return replies


class Awaiting:
    """Asks an `async def` function about several questions at once, always in one event loop: it may keep clients."""

    def __init__(self, fn: TextFn, concurrency: int, timeout_s: float | None) -> None:
        self.fn, self.concurrency, self.timeout_s = fn, concurrency, timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, questions: Sequence[Question], most_faults: int | None = None) -> list[Reply | None]:
        """Returns the reply to each question; see `RunFn`."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="async rewards").start()
        return asyncio.run_coroutine_threadsafe(self._ask_all(questions, most_faults), self._loop).result()

    async def _ask_all(self, questions: Sequence[Question], most_faults: int | None) -> list[Reply | None]:
        places, num_faults = asyncio.Semaphore(self.concurrency), 0

        async def one(question: Question) -> Reply | None:
            nonlocal num_faults
            async with places:
                if most_faults is not None and num_faults > most_faults:
                    return None
                reply = await self._ask(question)
                num_faults += isinstance(reply, Fault)
                return reply

        return await asyncio.gather(*map(one, questions))

    async def _ask(self, question: Question) -> Reply:
        num_answers = len(question.answers)
        try:
            reply = await_reply(self.fn, ask(self.fn, question), num_answers)
        except (Exception, SystemExit) as error:  # of a call that does not fit, before anything is awaited
            return Fault(describe_error(error))
        try:
            return await asyncio.wait_for(reply, None if self.timeout_s is None else self.timeout_s * num_answers)
        except TimeoutError:
            return Fault(f"no reward within reward.timeout_s={self.timeout_s:g}")
