"""How a function is asked about a step's answers: in this process, awaited, or in processes of its own."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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

# Gives the reply to each question, in their order.
RunFn = Callable[[Sequence[Question]], list[Reply]]
LARGEST = float(np.finfo(np.float32).max)
Outcome = float | str  # an answer's reward, or why it has none


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


class Scorer:
    """A function, and how it is asked. Not for several threads at once."""

    def __init__(self, fn: TextFn, run_fn: RunFn, *, retries: int = 0, size: int | None = None) -> None:
        """`size` is how many answers a call may be about; None: all."""
        self.fn, self.run_fn, self.retries, self.size = fn, run_fn, retries, 1 if takes_one(fn) else size

    def score(self, question: Question) -> list[Outcome]:
        """Returns each answer's reward, finite in float32, or why it has none.

        A call about several answers that raises or takes too long is made again for each of them alone.
        """
        count = len(question.answers)
        outcomes: list[Outcome] = [""] * count
        size = self.size or max(count, 1)
        pieces = [range(first, min(first + size, count)) for first in range(0, count, size)]
        for _ in range(1 + self.retries + (size > 1)):
            replies, failed = self.run_fn([question.pick(piece) for piece in pieces]), []
            for piece, reply in zip(pieces, replies, strict=True):
                is_fault = isinstance(reply, Fault)
                for i, place in enumerate(piece):
                    outcomes[place] = reply.reason if is_fault else _judge(reply[i])
                if is_fault and not reply.is_final:
                    failed += [range(place, place + 1) for place in piece]
            if not (pieces := failed):
                break
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


def run_here(fn: TextFn, questions: Sequence[Question]) -> list[Reply]:
    """Returns a function's reply to each question, asked in this thread one after the other."""
    return [find_reply(fn, question) for question in questions]


class Awaiting:
    """Asks an `async def` function about several questions at once, always in one event loop: it may keep clients."""

    def __init__(self, fn: TextFn, concurrency: int, timeout_s: float | None) -> None:
        self.fn, self.concurrency, self.timeout_s = fn, concurrency, timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, questions: Sequence[Question]) -> list[Reply]:
        """Returns the reply to each question."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="async rewards").start()
        return asyncio.run_coroutine_threadsafe(self._ask_all(questions), self._loop).result()

    async def _ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        places = asyncio.Semaphore(self.concurrency)

        async def one(question: Question) -> Reply:
            async with places:
                return await self._ask(question)

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
