"""Conversations as rows: what was drawn and what was said in between, as they go on and at their ends."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from realjax.engine.batching import Generation, Request
from realjax.environments.environment import Environment, Messages


@dataclass(frozen=True, kw_only=True, eq=False)
class Dialogue:
    """A row: all that follows its prompt, and what of it was sampled.

    `generation.ended`: the environment said that it is done, to an answer that ended by itself. Of a row that is not
    over, the last answer is under way; or the environment was asked for what follows it, and `ended` is of that answer.
    """

    prompt: np.ndarray  # [L]
    generation: Generation  # [N] tokens; log-probabilities and kept sets are 0 where none were drawn
    is_drawn: np.ndarray  # [N]
    rewards: np.ndarray  # [N] of each turn, at its last token
    num_turns: int
    num_retries: int
    failure: str | None
    is_over: bool = True
    is_asked: bool = False

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

    def answers(self) -> Iterator[tuple[np.ndarray, Generation]]:
        """Yields what was said before each answer, and the answer."""
        whole, edges = self.generation, np.flatnonzero(np.diff(self.is_drawn.astype(int))) + 1
        places = np.split(np.arange(len(self.is_drawn)), edges)
        for number in range(0, len(places), 2):
            said = self.prompt if number == 0 else whole.tokens[places[number - 1]]
            part, is_last = slice(places[number][0], places[number][-1] + 1), number == len(places) - 1
            yield (
                said,
                Generation(
                    tokens=whole.tokens[part],
                    logprobs=whole.logprobs[part],
                    ended=whole.ended if is_last else True,
                    kept=None if whole.kept is None else whole.kept[part],
                    routes=None if whole.routes is None else whole.routes[: len(self.prompt) + part.stop],
                ),
            )

    def without_draws(self, kept_width: int | None, routes_width: int | None) -> "Dialogue":
        """Returns a row for which nothing was drawn with no sets of kept tokens, and with experts, of such widths."""
        if self.generation.tokens.size:
            return self
        kept = None if kept_width is None else np.zeros((0, kept_width), np.int32)
        routes = None if routes_width is None else np.zeros((len(self.prompt), routes_width), np.int32)
        return replace(self, generation=replace(self.generation, kept=kept, routes=routes))


@dataclass(kw_only=True)
class Talk:
    """A row under way."""

    request: Request
    environment: Environment | None = None
    num_retries: int = 0
    rounds: list[Messages] = field(default_factory=list)
    prompt: np.ndarray | None = None
    parts: list[Generation] = field(default_factory=list)  # after the prompt, in turn: drawn, and what was said to it
    rewards: list[float] = field(default_factory=list)  # of the turns
    begun: Generation | None = None  # of the answer under way
    # What was said and drawn before the run was continued, in turn; and whether the last answer is whole.
    recorded: deque[tuple[np.ndarray, Generation]] = field(default_factory=deque)
    is_whole: bool = False

    @property
    def context(self) -> np.ndarray:
        assert self.prompt is not None, "the environment has begun"
        return np.concatenate([self.prompt, *(part.tokens for part in self.parts)])

    def differs(self, tokens: Sequence[int]) -> bool:
        """Returns whether the environment says something else than it did before the run was continued."""
        return bool(self.recorded) and self.recorded[0][0].tolist() != list(tokens)

    def say(self, tokens: Sequence[int]) -> None:
        """Adds what is not sampled."""
        last, count = self.parts[-1], len(tokens)
        kept = None if last.kept is None else np.zeros((count, last.kept.shape[1]), last.kept.dtype)
        said = np.array(tokens, np.int32)
        self.parts.append(Generation(tokens=said, logprobs=np.zeros(count, np.float32), ended=False, kept=kept))

    def finish(self, ended: bool, failure: str | None = None) -> Dialogue:
        """Returns the row at its end."""
        return self._join(self.parts, ended=ended, failure=failure)

    def so_far(self) -> Dialogue | None:
        """Returns the row up to its last answer, which may be under way; None before it has one."""
        if self.recorded:  # it was brought this far before, and is on its way there again
            return None
        parts = [*self.parts, *([] if self.begun is None else [self.begun])]
        parts = parts[: len(parts) - 1 + len(parts) % 2]
        if not parts:
            return None
        is_asked = self.begun is None
        dialogue = self._join(parts, ended=is_asked and parts[-1].ended, failure=None)
        return replace(dialogue, is_over=False, is_asked=is_asked)

    def _join(self, parts: Sequence[Generation], *, ended: bool, failure: str | None) -> Dialogue:
        drawn = parts[::2]
        prompt = self.request.tokens if self.prompt is None else self.prompt
        join = lambda arrays, dtype: np.concatenate([np.zeros(0, dtype), *arrays])
        is_drawn = [np.full(len(part.tokens), i % 2 == 0) for i, part in enumerate(parts)]
        rewards = [np.zeros(len(part.tokens), np.float32) for part in parts]
        for part, reward in zip(rewards[::2], self.rewards, strict=False):
            part[-1] = reward
        kept = [part.kept for part in parts if part.kept is not None]
        generation = Generation(
            tokens=join([part.tokens for part in parts], np.int32),
            logprobs=join([part.logprobs for part in parts], np.float32),
            ended=ended,
            kept=np.concatenate(kept) if kept else None,
            routes=_join_routes([part.routes for part in drawn if part.routes is not None]),
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


def _join_routes(routes: Sequence[np.ndarray]) -> np.ndarray | None:
    """Returns the experts of a row's tokens: of each answer those with which it was drawn.

    Those of an answer `[K, W]` begin with the row's first token, and of its last one they are not known.
    """
    if not routes:
        return None
    parts, num_before = [], 0
    for one in routes:
        parts.append(one[num_before:-1])
        num_before = len(one) - 1
    return np.pad(np.concatenate(parts), ((0, 1), (0, 0)))
