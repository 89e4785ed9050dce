"""Rows in turns: a row leaves its slot at the end of its answer, and comes back with what the environment said to it.

Token in, token out: the row's next prompt is its earlier tokens as they were sampled, and those that the chat template
writes around the new messages. A turn is put in anew, earlier ones included: their cache has gone to another row.

Several processes hold the same conversations: one of them calls the environments, all hear the same of them in the same
order, and so put in the same rows.
"""

import copy
import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import replace

import jax
import numpy as np

from realjax.core.json_text import JsonObject
from realjax.core.processes import Mailbox
from realjax.dataflow.turns import Turns
from realjax.engine.batching import Batcher, Generation, Request
from realjax.environments.environment import Messages, Step, read_messages, read_step
from realjax.runtime.dialogues import Dialogue, Talk
from realjax.runtime.threads import Failed, SharedCalls, TimedCalls

logger = logging.getLogger("realjax.turns")
# How long an environment that is quick may keep rows from being decoded.
SHORT_SECONDS = 0.002

Calls = SharedCalls[Messages | Step]


class Talks:
    """Conversations that go on at once, by the keys that they are added with; also from one draw to the next."""

    def __init__(self, turns: Turns, seed: int, calls: Calls) -> None:
        """`seed` is the run's; a row's follows from it and from the row's numbers."""
        self.turns, self.seed, self._calls = turns, seed, calls
        self._rows: dict[Hashable, Talk] = {}
        self._decoded: dict[int, Hashable] = {}  # rows by the batcher's numbers
        self._paused: list[Hashable] = []  # to be put in by the next draw
        self._found: dict[Hashable, Dialogue] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def add(self, key: Hashable, request: Request, so_far: Dialogue | None = None) -> None:
        """Begins a row, of which the tokens are the environment's to give; or, in a run that continues, brings one as
        far as it was: its environment is asked anew, and given the answers that were drawn.
        """
        talk = Talk(request=request)
        if so_far is not None:
            talk.num_retries, talk.is_whole = so_far.num_retries, so_far.is_asked
            talk.recorded.extend(so_far.answers())
        self._begin(key, talk)

    def run(self, batcher: Batcher, due: Collection[Hashable], num_rows: int) -> dict[Hashable, Dialogue]:
        """Continues all rows until the `due` ones are at their ends; returns those that are.

        Raises ValueError as soon as more of them have failed than a share of `num_rows`, those of a step.
        """
        self._calls.end_round()
        paused, self._paused = self._paused, []
        for key in paused:
            self._submit(batcher, key)
        while any(key in self._rows for key in due):
            for key, result in self._calls.take(SHORT_SECONDS if self._decoded else None):
                self._take_in(batcher, key, result)
            if self._decoded:
                batcher.poll()
                self._ask(batcher, batcher.results())
            self._refuse_failures(due, num_rows)
        self._interrupt(batcher)
        found, self._found = self._found, {}
        self._tell(found.values())
        return found

    def so_far(self, key: Hashable) -> Dialogue | None:
        """Returns a row that is not over up to its last answer; None before it has one."""
        return self._rows[key].so_far()

    def _interrupt(self, batcher: Batcher) -> None:
        """Takes rows out of their slots, to go on with another draw's parameters."""
        taken = batcher.take_out(self._decoded)
        self._ask(batcher, batcher.results())
        for number, request in taken.items():
            key = self._decoded.pop(number)
            self._rows[key].begun = request.begun
            self._paused.append(key)

    def _begin(self, key: Hashable, talk: Talk) -> None:
        numbers = (self.seed, talk.request.row_id, talk.request.sample_id)
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        prompt: JsonObject = copy.deepcopy(self.turns.rows[talk.request.row_id])
        self._rows[key] = talk

        def reset() -> Messages:
            talk.environment = self.turns.make(seed)
            return read_messages(talk.environment.reset(prompt), "what reset returned")

        self._calls.start(key, reset)

    def _take_in(self, batcher: Batcher, key: Hashable, result: Messages | Step | Failed) -> None:
        """Goes on with a row whose environment has answered."""
        talk = self._rows[key]
        if isinstance(result, Failed):
            return self._fail(key, result.reason)
        try:
            if isinstance(result, list):
                self._open(batcher, key, talk, result)
            else:
                self._go_on(batcher, key, talk, *result)
        except ValueError as error:  # of the template, for these messages
            self._fail(key, str(error))
        return None

    def _open(self, batcher: Batcher, key: Hashable, talk: Talk, messages: Messages) -> None:
        tokens = self.turns.template.open(messages, talk.request.row_id)
        most = self.turns.max_tokens - batcher.programs.sampler.config.max_new_tokens
        if not 0 < len(tokens) <= most:
            return self._fail(
                key, f"its first messages have {len(tokens)} tokens, where env.max_seqlen leaves room for 1 to {most}"
            )
        if talk.differs(tokens):
            return self._begin_anew(key, talk)
        talk.rounds, talk.prompt = [messages], np.array(tokens, np.int32)
        return self._draw(batcher, key, talk)

    def _go_on(
        self, batcher: Batcher, key: Hashable, talk: Talk, messages: Messages, reward: float, is_done: bool
    ) -> None:
        talk.rewards.append(reward)
        last, num_turns = talk.parts[-1], len(talk.rewards)
        if is_done or not last.ended or num_turns == self.turns.max_turns:
            return self._finish(key, talk.finish(ended=is_done and last.ended))
        talk.rounds.append(messages)
        more = self.turns.template.follow(talk.rounds, int(last.tokens[-1]), talk.request.row_id)
        num_new = batcher.programs.sampler.config.max_new_tokens
        if len(talk.context) + len(more) + num_new > self.turns.max_tokens:
            return self._finish(key, talk.finish(ended=False))
        if talk.differs(more):
            return self._begin_anew(key, talk)
        talk.say(more)
        return self._draw(batcher, key, talk)

    def _draw(self, batcher: Batcher, key: Hashable, talk: Talk) -> None:
        """Has the row answer; in a run that continues, as it did before."""
        if talk.recorded:
            _, generation = talk.recorded.popleft()
            if talk.recorded or talk.is_whole:
                return self._answer(batcher, key, generation)
            talk.begun = generation
        return self._submit(batcher, key)

    def _submit(self, batcher: Batcher, key: Hashable) -> None:
        """Puts a row in. Each turn has randomness of its own, whenever its turn comes."""
        talk = self._rows[key]
        sample_id = talk.request.sample_id * self.turns.max_turns + len(talk.rewards)
        request = replace(talk.request, tokens=talk.context, sample_id=sample_id, begun=talk.begun)
        (number,) = batcher.submit([request])
        self._decoded[number] = key

    def _ask(self, batcher: Batcher, results: dict[int, Generation]) -> None:
        """Has environments answer what rows have drawn, by the batcher's numbers."""
        for number, generation in results.items():
            self._answer(batcher, self._decoded.pop(number), generation)

    def _answer(self, batcher: Batcher, key: Hashable, generation: Generation) -> None:
        talk, tokens = self._rows[key], generation.tokens
        talk.parts.append(generation)
        talk.begun = None
        has_end = generation.ended and int(tokens[-1]) in batcher.programs.sampler.eos_ids
        text = self.turns.template.read((tokens[:-1] if has_end else tokens).tolist())

        def step() -> Step:
            assert talk.environment is not None, "it has begun"
            return read_step(talk.environment.step(text), "what step returned")

        self._calls.start(key, step)

    def _fail(self, key: Hashable, reason: str) -> None:
        """Begins a row again, with the same randomness; or ends it where that was its last try."""
        talk = self._rows[key]
        if talk.num_retries < self.turns.max_retries:
            self._begin(key, Talk(request=talk.request, num_retries=talk.num_retries + 1))
        else:
            self._finish(key, talk.finish(ended=False, failure=reason))

    def _begin_anew(self, key: Hashable, talk: Talk) -> None:
        """Begins a row again whose environment has not said what it did before the run was continued."""
        logger.warning(
            "env.path: the environment of the row with id %s says something else than before the run was continued; "
            "the row is begun again", talk.request.row_id,
        )  # fmt: skip
        self._begin(key, Talk(request=talk.request, num_retries=talk.num_retries + 1))

    def _finish(self, key: Hashable, dialogue: Dialogue) -> None:
        self._found[key] = dialogue
        del self._rows[key]

    def _refuse_failures(self, due: Collection[Hashable], num_rows: int) -> None:
        found = [self._found[key].failure for key in due if key in self._found]
        reasons = [failure for failure in found if failure is not None]
        if len(reasons) > (most := self.turns.max_failed_share) * num_rows:
            raise ValueError(
                f"env.path: {len(reasons)} of {num_rows} conversations have failed, and reward.max_failed_share is "
                f"{most:g}; of one of them the environment says: {reasons[0]}; mend the cause, or raise the share"
            )

    def _tell(self, found: Iterable[Dialogue]) -> None:
        """Says why rows failed: the first reason, and how many there are."""
        dialogues = list(found)
        reasons = [dialogue.failure for dialogue in dialogues if dialogue.failure is not None]
        if reasons:
            logger.warning(
                "env.path: %d of %d rows failed, each in %d tries, and are left out; of one of them the environment "
                "says: %s", len(reasons), len(dialogues), self.turns.max_retries + 1, reasons[0],
            )  # fmt: skip


def make_calls(turns: Turns, source: int = 0, now_fn: Callable[[], float] = time.monotonic) -> Calls:
    """Returns the calls of environments, which the process `source` makes. Every process must call this."""
    mailbox = Mailbox("environment") if jax.process_count() > 1 else None
    return SharedCalls(TimedCalls(turns.num_threads, turns.step_seconds, now_fn), mailbox, source)


def converse(batcher: Batcher, requests: Sequence[Request], turns: Turns, seed: int, calls: Calls) -> list[Dialogue]:
    """Returns the rows of the requests at their ends, in their order."""
    talks = Talks(turns, seed, calls)
    for index, request in enumerate(requests):
        talks.add(index, request)
    found = talks.run(batcher, range(len(requests)), len(requests))
    return [complete(batcher, found[index]) for index in range(len(requests))]


def complete(batcher: Batcher, dialogue: Dialogue) -> Dialogue:
    """Returns a row with the keys that all of a batch have, where nothing was drawn for it too."""
    programs = batcher.programs
    stored = programs.sampler.find_kept_form(programs.model.config.vocab_size)
    return dialogue.without_draws(stored and stored.width, programs.routes and programs.routes.width)
