"""Rows on their way from prompts to the step that trains on them: what is finished of them, and what is begun."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from realjax.engine.batching import Generation, Request
from realjax.runtime.dialogues import Dialogue

Arrays = Mapping[str, np.ndarray]
DTYPES = {"logprobs": np.float32, "turn_rewards": np.float32, "is_drawn": np.bool_}


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A prompt of a step, and its answer as far as it is there.

    `step` is the one that trains on it. `versions` `[N]` int32 says of each token of the answer, finished or begun,
    after how many steps of training its parameters were. With an environment, tokens that it said are among them.
    """

    step: int
    request: Request  # its `begun` is the answer so far, None where there is nothing or all of it
    generation: Generation | None = None  # all of it
    versions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    dialogue: Dialogue | None = None  # with an environment: the same as a conversation

    @property
    def answer(self) -> Generation | None:
        """What is there."""
        return self.dialogue.generation if self.dialogue is not None else self.generation or self.request.begun

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """Its step and its numbers. Rows that have them in common are the same in all else too."""
        return self.step, self.request.row_id, self.request.sample_id, self.request.is_greedy

    @property
    def ages(self) -> np.ndarray:
        """Steps of training between each token's parameters and those that its training begins with."""
        return self.step - self.versions

    def finished(self, generation: Generation, version: int) -> "Row":
        """Returns the row with its whole answer, whose new tokens are of a version."""
        request = replace(self.request, begun=None)
        return replace(self, request=request, generation=generation, versions=self._extend(generation, version))

    def interrupted(self, request: Request, version: int) -> "Row":
        """Returns the row to go on with under other parameters."""
        versions = self.versions if request.begun is None else self._extend(request.begun, version)
        return replace(self, request=request, versions=versions)

    def told(self, dialogue: Dialogue | None, version: int) -> "Row":
        """Returns the row with its conversation as far as it is there; None: nothing has come to what was there."""
        if dialogue is None:
            return self
        is_same = self.dialogue is not None and self.dialogue.num_retries == dialogue.num_retries
        before = self if is_same else replace(self, versions=self.versions[:0])  # else it was begun again
        return replace(
            self,
            request=replace(self.request, tokens=dialogue.prompt),
            generation=dialogue.generation if dialogue.is_over else None,
            versions=before._extend(dialogue.generation, version),
            dialogue=dialogue,
        )

    def _extend(self, generation: Generation, version: int) -> np.ndarray:
        num_new = len(generation.tokens) - len(self.versions)
        return np.concatenate([self.versions, np.full(num_new, version, np.int32)])


def flatten_rows(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Returns rows as a few arrays, none of them empty, for `join_rows`; no rows are no arrays."""
    answers = [row.answer for row in rows]
    there = [answer for answer in answers if answer is not None]
    dialogues = [row.dialogue for row in rows if row.dialogue is not None]
    numbers = [
        (
            row.step, row.request.row_id, row.request.sample_id, row.request.is_greedy, len(row.request.tokens),
            -1 if answer is None else len(answer.tokens), row.generation is not None,
            answer is not None and answer.ended, *_describe(row.dialogue),
        )
        for row, answer in zip(rows, answers, strict=True)
    ]  # fmt: skip
    arrays = {
        "numbers": np.array(numbers, np.int32),
        "prompts": _join(row.request.tokens for row in rows),
        "tokens": _join(answer.tokens for answer in there),
        "logprobs": _join(answer.logprobs for answer in there),
        "versions": _join(row.versions for row in rows),
        "kept": _join(answer.kept for answer in there if answer.kept is not None),
        "routes": _join(answer.routes for answer in there if answer.routes is not None),
        "is_drawn": _join(dialogue.is_drawn for dialogue in dialogues),
        "turn_rewards": _join(dialogue.rewards for dialogue in dialogues),
    }
    return {name: array for name, array in arrays.items() if array is not None and array.size}


def join_rows(arrays: Arrays) -> list[Row]:
    """Returns the rows of `flatten_rows`."""
    rows = list[Row]()
    at: dict[str, int] = {"prompts": 0, "tokens": 0, "versions": 0, "routes": 0, "is_drawn": 0}

    def take(name: str, count: int, like: str | None = None) -> np.ndarray:
        start = at[like or name]
        found = arrays.get(name)
        return np.zeros(0, DTYPES.get(name, np.int32)) if found is None else found[start:][:count]

    for numbers in arrays.get("numbers", ()):
        step, row_id, sample_id, is_greedy, num_prompt, num_new, is_done, ended = (
            int(number) for number in numbers[:8]
        )
        request = Request(
            tokens=take("prompts", num_prompt), row_id=row_id, sample_id=sample_id, is_greedy=bool(is_greedy)
        )
        answer = None
        if num_new >= 0:
            answer = Generation(
                tokens=take("tokens", num_new),
                logprobs=take("logprobs", num_new, "tokens"),
                ended=bool(ended),
                kept=take("kept", num_new, "tokens") if "kept" in arrays else None,
                routes=take("routes", num_prompt + num_new) if "routes" in arrays else None,
            )
        versions = take("versions", max(0, num_new))
        dialogue = None
        if answer is not None and len(numbers) > 8 and numbers[8]:
            is_drawn, rewards = take("is_drawn", num_new), take("turn_rewards", num_new, "is_drawn")
            dialogue = _join_dialogue(request.tokens, answer, is_drawn, rewards, numbers[9:], is_over=bool(is_done))
            at["is_drawn"] += num_new
        steps = {"prompts": num_prompt, "tokens": max(0, num_new), "versions": len(versions)}
        at |= {name: at[name] + count for name, count in steps.items()}
        at["routes"] += 0 if answer is None else num_prompt + num_new
        request = request if is_done or dialogue is not None else replace(request, begun=answer)
        generation = answer if is_done else None
        rows.append(Row(step=step, request=request, generation=generation, versions=versions, dialogue=dialogue))
    return rows


def _describe(dialogue: Dialogue | None) -> tuple[int, ...]:
    """Returns whether there is a conversation, and what is known of it beside its tokens."""
    if dialogue is None:
        return (0, 0, 0, 0, 0)
    return (1, dialogue.num_turns, dialogue.num_retries, dialogue.failure is not None, dialogue.is_asked)


def _join_dialogue(
    prompt: np.ndarray,
    generation: Generation,
    is_drawn: np.ndarray,
    rewards: np.ndarray,
    numbers: Iterable[int],
    *,
    is_over: bool,
) -> Dialogue:
    num_turns, num_retries, has_failed, is_asked = (int(number) for number in numbers)
    return Dialogue(
        prompt=prompt,
        generation=generation,
        is_drawn=is_drawn,
        rewards=rewards,
        num_turns=num_turns,
        num_retries=num_retries,
        failure="it failed before the run was continued" if has_failed else None,
        is_over=is_over,
        is_asked=bool(is_asked),
    )


def dump_rows(rows: Sequence[Row]) -> bytes:
    """Returns rows as bytes, for `load_rows`."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **flatten_rows(rows))
    return file.getvalue()


def load_rows(data: bytes) -> list[Row]:
    """Returns the rows of `dump_rows`."""
    with np.load(io.BytesIO(data)) as arrays:
        return join_rows(dict(arrays))


def _join(parts: Iterable[np.ndarray]) -> np.ndarray | None:
    parts = list(parts)
    return np.concatenate(parts) if parts else None
