"""Rows in turns: a row leaves its slot at the end of its answer, and comes back with what the environment said to it.

Token in, token out: the row's next prompt is its earlier tokens as they were sampled, and those that the chat template
writes around the new messages. A turn is put in anew, earlier ones included: their cache has gone to another row.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from realjax.core.json_text import JsonObject
from realjax.dataflow.turns import Turns
from realjax.engine.batching import Batcher, Generation, Request
from realjax.environments.environment import Environment, Messages, Step, read_messages, read_step
from realjax.runtime.threads import Failed, TimedCalls

logger = logging.getLogger("realjax.turns")
# How long an environment that is quick may keep rows from being decoded, and how long to wait where none are.
SHORT_SECONDS, LONG_SECONDS = 0.002, 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Dialogue:
    """A row at its end: all that follows its prompt, and what of it was sampled.

    `generation.ended`: the environment said that it is done, to an answer that ended by itself.
    """

    prompt: np.ndarray  # [L]
    generation: Generation  # [N] tokens; log-probabilities and kept sets are 0 where none were drawn
    is_drawn: np.ndarray  # [N]
    rewards: np.ndarray  # [N] of each turn, at its last token
    num_turns: int
    num_retries: int
    failure: str | None

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what a rollout has of it beside the keys of any answer."""
        front = (len(self.prompt), 0)
        return {
            "loss_mask": np.pad(self.is_drawn, front),
            "turn_rewards": np.pad(self.rewards, front),
            "num_turns": np.array(self.num_turns, np.int32),
            "num_retries": np.array(self.num_retries, np.int32),
            "env_failed": np.array(self.failure is not None),
        }


@dataclass(kw_only=True)
class _Row:
    """A row under way."""

    request: Request
    environment: Environment
    num_retries: int = 0
    rounds: list[Messages] = field(default_factory=list)
    prompt: np.ndarray | None = None
    parts: list[Generation] = field(default_factory=list)  # after the prompt, in turn: drawn, and what was said to it
    rewards: list[float] = field(default_factory=list)  # of the turns

    @property
    def context(self) -> np.ndarray:
        assert self.prompt is not None, "the environment has begun"
        return np.concatenate([self.prompt, *(part.tokens for part in self.parts)])

    def say(self, tokens: Sequence[int]) -> None:
        """Adds what is not sampled."""
        last, count = self.parts[-1], len(tokens)
        kept = None if last.kept is None else np.zeros((count, last.kept.shape[1]), last.kept.dtype)
        said = np.array(tokens, np.int32)
        self.parts.append(Generation(tokens=said, logprobs=np.zeros(count, np.float32), ended=False, kept=kept))

    def finish(self, ended: bool, failure: str | None = None) -> Dialogue:
        drawn = self.parts[::2]
        prompt = self.request.tokens if self.prompt is None else self.prompt
        join = lambda arrays, dtype: np.concatenate([np.zeros(0, dtype), *arrays])
        is_drawn = [np.full(len(part.tokens), i % 2 == 0) for i, part in enumerate(self.parts)]
        rewards = [np.zeros(len(part.tokens), np.float32) for part in self.parts]
        for part, reward in zip(rewards[::2], self.rewards, strict=False):
            part[-1] = reward
        kept = [part.kept for part in self.parts if part.kept is not None]
        generation = Generation(
            tokens=join([part.tokens for part in self.parts], np.int32),
            logprobs=join([part.logprobs for part in self.parts], np.float32),
            ended=ended,
            kept=np.concatenate(kept) if kept else None,
        )
        return Dialogue(
            prompt=prompt,
            generation=generation,
            is_drawn=join(is_drawn, np.bool_),
            rewards=join(rewards, np.float32),
            num_turns=len(drawn),
            num_retries=self.num_retries,
            failure=failure,
        )


class Talks:
    """The conversations of a generate call, all at once."""

    def __init__(self, batcher: Batcher, turns: Turns, seed: int) -> None:
        """`seed` is the run's; a row's follows from it and from the row's numbers."""
        self.batcher, self.turns, self.seed = batcher, turns, seed
        self.max_new_tokens = batcher.programs.sampler.config.max_new_tokens
        self._calls: TimedCalls[Messages | Step] = TimedCalls(turns.num_threads, turns.step_seconds)
        self._rows: dict[int, _Row] = {}
        self._decoded: dict[int, int] = {}  # rows by the batcher's numbers
        self._found: dict[int, Dialogue] = {}

    def run(self, requests: Sequence[Request]) -> list[Dialogue]:
        """Returns the rows of the requests, of which the tokens are the environment's to give."""
        for index, request in enumerate(requests):
            self._begin(index, request, num_retries=0)
        while self._rows:
            for index, result in self._calls.take(SHORT_SECONDS if self._decoded else LONG_SECONDS):
                self._take_in(index, result)
            if self._decoded:
                self.batcher.poll()
                for number, generation in self.batcher.results().items():
                    self._ask(self._decoded.pop(number), generation)
        self._tell()
        return [self._found[index] for index in range(len(requests))]

    def _begin(self, index: int, request: Request, num_retries: int) -> None:
        numbers = (self.seed, request.row_id, request.sample_id)
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        prompt: JsonObject = copy.deepcopy(self.turns.rows[request.row_id])
        row = _Row(request=request, environment=self.turns.make(seed), num_retries=num_retries)
        self._rows[index] = row
        self._calls.start(index, lambda: read_messages(row.environment.reset(prompt), "what reset returned"))

    def _take_in(self, index: int, result: Messages | Step | Failed) -> None:
        """Goes on with a row whose environment has answered."""
        row = self._rows[index]
        if isinstance(result, Failed):
            return self._fail(index, result.reason)
        try:
            if isinstance(result, list):
                self._open(index, row, result)
            else:
                self._go_on(index, row, *result)
        except ValueError as error:  # of the template, for these messages
            self._fail(index, str(error))
        return None

    def _open(self, index: int, row: _Row, messages: Messages) -> None:
        tokens = self.turns.template.open(messages, row.request.row_id)
        most = self.turns.max_tokens - self.max_new_tokens
        if not 0 < len(tokens) <= most:
            return self._fail(
                index, f"its first messages have {len(tokens)} tokens, where env.max_seqlen leaves room for 1 to {most}"
            )
        row.rounds, row.prompt = [messages], np.array(tokens, np.int32)
        return self._submit(index, row)

    def _go_on(self, index: int, row: _Row, messages: Messages, reward: float, is_done: bool) -> None:
        row.rewards.append(reward)
        last, num_turns = row.parts[-1], len(row.rewards)
        if is_done or not last.ended or num_turns == self.turns.max_turns:
            return self._finish(index, row.finish(ended=is_done and last.ended))
        row.rounds.append(messages)
        more = self.turns.template.follow(row.rounds, int(last.tokens[-1]), row.request.row_id)
        if len(row.context) + len(more) + self.max_new_tokens > self.turns.max_tokens:
            return self._finish(index, row.finish(ended=False))
        row.say(more)
        return self._submit(index, row)

    def _submit(self, index: int, row: _Row) -> None:
        """Has the row answer. Each turn has randomness of its own, whenever its turn comes."""
        sample_id = row.request.sample_id * self.turns.max_turns + len(row.rewards)
        (number,) = self.batcher.submit([replace(row.request, tokens=row.context, sample_id=sample_id)])
        self._decoded[number] = index

    def _ask(self, index: int, generation: Generation) -> None:
        """Has the environment answer what the row has drawn."""
        row, tokens = self._rows[index], generation.tokens
        row.parts.append(generation)
        kept = tokens[:-1] if generation.ended else tokens
        text = self.turns.template.read(kept.tolist())
        self._calls.start(index, lambda: read_step(row.environment.step(text), "what step returned"))

    def _fail(self, index: int, reason: str) -> None:
        """Begins a row again, with the same randomness; or ends it where that was its last try."""
        row = self._rows[index]
        if row.num_retries < self.turns.max_retries:
            self._begin(index, row.request, row.num_retries + 1)
        else:
            self._finish(index, row.finish(ended=False, failure=reason))

    def _finish(self, index: int, dialogue: Dialogue) -> None:
        self._found[index] = dialogue
        del self._rows[index]

    def _tell(self) -> None:
        """Says why rows failed: the first reason, and how many there are."""
        reasons = [dialogue.failure for dialogue in self._found.values() if dialogue.failure is not None]
        if reasons:
            logger.warning(
                "env.path: %d of %d rows failed, each in %d tries, and are left out; of one of them the environment "
                "says: %s", len(reasons), len(self._found), self.turns.max_retries + 1, reasons[0],
            )  # fmt: skip


def converse(batcher: Batcher, requests: Sequence[Request], turns: Turns, seed: int) -> list[Dialogue]:
    """Returns the rows of the requests at their ends, in their order."""
    dialogues = Talks(batcher, turns, seed).run(requests)
    stored = batcher.programs.sampler.find_kept_form(batcher.programs.model.config.vocab_size)
    if stored is None:
        return dialogues
    # Of rows that nothing was drawn for, the sets are empty, but there are sets.
    none = np.zeros((0, stored.width), np.int32)
    give = lambda row: row if row.generation.kept is not None else _with_kept(row, none)
    return [give(row) for row in dialogues]


def _with_kept(row: Dialogue, kept: np.ndarray) -> Dialogue:
    return replace(row, generation=replace(row.generation, kept=kept))
