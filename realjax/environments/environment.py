"""What a model talks with in turns, and the class that an option names."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from realjax.core.json_text import JsonObject
from realjax.core.named import load_named, shorten
from realjax.environments.tools import HERMES, ToolFormat

# Each has `role` and `content`; a tool's result may have more.
Messages = list[dict[str, str]]
Step = tuple[Messages, float, bool]
EXAMPLE = "<module>:<Class>, such as realjax.environments.calculator:Calculator"


class Environment(ABC):
    """One conversation: an instance is made for each row, and is used by one thread at a time.

    Whatever raises ends the row as failed, after it has been tried again from its beginning. A class of another kind
    serves too, if it has the two methods.
    """

    # Descriptions of its tools in JSON schema, for the tokenizer's chat template.
    tools: ClassVar[Sequence[JsonObject]] = ()
    # Both are set before `reset`. The seed follows from the run's seed, the step and the row.
    seed: int = 0
    tool_format: ToolFormat = HERMES  # how the model's chat template writes a call of a tool

    @abstractmethod
    def reset(self, prompt: JsonObject) -> Messages:
        """Returns the messages that the model answers first; `prompt` is the data's row with all its keys."""

    @abstractmethod
    def step(self, answer: str) -> Step:
        """Returns what follows the model's answer: messages, the reward of this turn, and whether that was the last.

        `answer` is its text with all special tokens but the one that ended it. The last turn's messages are not read.
        """


def load_environment(path: str, option: str = "env.path") -> type[Environment]:
    """Returns the class at `module:Class`; ValueError, naming the option, where it is none with the two methods."""
    found: Any = load_named(path, option, EXAMPLE)
    if not inspect.isclass(found):
        has = "nothing" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"{option}: {path!r} names {has}; it needs a class with reset(prompt) and step(answer)")
    for name in ("reset", "step"):
        method = getattr(found, name, None)
        if not callable(method):
            raise ValueError(f"{option}: {path!r} has no method {name}; it needs reset(prompt) and step(answer)")
        try:
            inspect.signature(method).bind(None, None)
        except TypeError as error:
            raise ValueError(
                f"{option}: {name} of {path!r} takes {inspect.signature(method)} ({error}); it needs reset(prompt) and "
                "step(answer)"
            ) from error
    return cast("type[Environment]", found)


def read_messages(found: object, subject: str) -> Messages:
    """Returns messages; ValueError, which says whose they are, for anything else."""
    needed = "it needs to be a list of messages, at least one, with the texts role and content"
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"{subject} is {shorten(found)}; {needed}")
    for message in found:
        texts = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not texts:
            raise ValueError(f"{subject} holds {shorten(message)}; {needed}")
    return list(found)


def read_step(found: object, subject: str) -> Step:
    """Returns what `step` gave; ValueError, which says whose it is, for anything else, such as a reward of nan."""
    needed = "it needs to be (messages, reward, done)"
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise ValueError(f"{subject} is {shorten(found)}; {needed}")
    messages, reward, done = found
    try:
        number = float(reward)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{subject} has the reward {shorten(reward)}; {needed}, the reward a number") from error
    if not abs(number) < 3e38:
        raise ValueError(f"{subject} has the reward {number}; it must be finite in float32")
    return ([] if done else read_messages(messages, subject)), number, bool(done)
