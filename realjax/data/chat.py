"""Conversations in a tokenizer's chat template: prompts up to where the answer begins, and answers that are learned."""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from realjax.core.json_text import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
Turns = Literal["all", "last"]
Span = tuple[int, int]  # of characters or tokens: first, and one past the last

# The key of a row for what stands between its prompt and an answer where no template says so.
PROMPT_END = "prompt_end"


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text to be tokenised, and the parts of it that are learned, in order."""

    text: str
    spans: tuple[Span, ...]
    is_rendered: bool = False  # by a template, which writes its own special tokens

    @property
    def learns_end(self) -> bool:
        """True when the last part goes to the end, so that what ends the text is learned with it."""
        return bool(self.spans) and self.spans[-1][1] >= len(self.text)


def prompt_kinds(tokenizer: "PreTrainedTokenizerBase", use_chat_template: bool) -> type | tuple[type, ...]:
    """Returns the types that a row's prompt may have. Raises ValueError for a template that the tokenizer lacks."""
    if use_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"dataset.use_chat_template: the tokenizer {tokenizer.name_or_path!r} has no chat template; set it to "
            "False for rows of plain prompts and answers, take the checkpoint of a chat model, or copy its "
            "chat_template.jinja beside the tokenizer"
        )
    return (str, list) if use_chat_template else str


def check_messages(row: JsonObject, subject: str) -> None:
    """Raises ValueError for a prompt that is a list of anything but messages, or of none."""
    if not isinstance(row["prompt"], list):
        return
    if not row["prompt"]:
        raise ValueError(f"{subject}: 'prompt' is empty; write one, or remove the row")
    for number, message in enumerate(row["prompt"], start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{subject}: message {number} of 'prompt' is not an object with the strings 'role' and 'content'"
            )


@dataclass(frozen=True, kw_only=True)
class Template:
    """A tokenizer's chat template, as it writes the rows of one source."""

    tokenizer: "PreTrainedTokenizerBase"
    subject: str  # the source's, which messages begin with
    tools: tuple[JsonObject, ...] = ()  # that the template tells the model of

    def render(self, messages: Messages, row_id: object, *, opens_answer: bool = True) -> str:
        """Returns the text of a row's messages, the assistant's turn opened where asked for.

        Raises ValueError where the template refuses them, or leaves out what a tool is asked or answers.
        """
        try:
            found = self.tokenizer.apply_chat_template(
                messages, tools=list(self.tools) or None, tokenize=False, add_generation_prompt=opens_answer
            )
        except Exception as error:  # a template is code of its own
            raise self._refusal(row_id, error) from error
        text = cast(str, found)
        self._check_tools(messages, text, row_id)
        return text

    def _check_tools(self, messages: Messages, text: str, row_id: object) -> None:
        for message in messages:
            calls = cast("list[JsonObject]", message.get("tool_calls") or [])
            is_shown = message["role"] != "tool" or is_written(message["content"], text)
            if not is_shown or not all(is_written(call["function"]["name"], text) for call in calls):
                raise ValueError(
                    f"{self.subject}: the tokenizer's chat template leaves out what a tool "
                    f"{'is asked' if is_shown else 'answers'} in the conversation with id {row_id!r}; use a tokenizer "
                    "whose template knows tools, or write calls and answers into the messages' texts"
                )

    def render_answer(self, prompt: str, messages: Messages, row_id: object) -> str:
        """Returns what follows a rendered prompt in the conversation that goes on with an answer, to the answer's end.

        `messages` are those of the prompt and the answer. Raises ValueError where the template writes the prompt anew.
        """
        text = self.render(messages, row_id, opens_answer=False)
        if not text.startswith(prompt):
            raise ValueError(
                f"{self.subject}: the tokenizer's chat template writes the conversation with id {row_id!r} in another "
                "way once its answer is there, so it is not known which part is the answer; use a template that only "
                "adds to it"
            )
        return self._end_with_turn(text)[len(prompt) :]

    def render_dialogue(self, row: JsonObject, turns: Turns = "all") -> Passage:
        """Returns a conversation; learned are the assistant's turns, or the last, with what ends them.

        Where the template marks them ({% generation %}), they are as marked. Otherwise a turn is what it adds to the
        conversation before it, opened for the assistant. Raises ValueError where that cannot be told.
        """
        messages, row_id, num_given = row["messages"], row.get("id"), row["num_given"]
        if (tools := tuple(row.get("tools", ()))) != self.tools:
            return replace(self, tools=tools).render_dialogue(row, turns)
        if self._marks_turns:
            text, spans = self._render_marked(messages, row_id)
            num_chars = len(self.render(messages[:num_given], row_id)) if num_given else 0
            spans = [span for span in spans if span[0] >= num_chars]
        else:
            text = self.render(messages, row_id, opens_answer=False)
            numbers = [i for i in range(num_given, len(messages)) if messages[i]["role"] == "assistant"]
            spans = [self._find_turn(row, i, text) for i in (numbers[-1:] if turns == "last" else numbers)]
        if not spans:
            raise ValueError(f"{self.subject}: the conversation with id {row_id!r} has no answer to learn; remove it")
        if not self._ends_in_special(text):
            text = text.rstrip() if len(text.rstrip()) > spans[-1][0] else text
            spans[-1] = (spans[-1][0], len(text))
        return Passage(text=text, spans=tuple(spans[-1:] if turns == "last" else spans), is_rendered=True)

    def _refusal(self, row_id: object, error: Exception) -> ValueError:
        return ValueError(
            f"{self.subject}: the tokenizer's chat template refuses the prompt with id {row_id!r} ({error}); mend its "
            "messages, or set dataset.use_chat_template=False"
        )

    @cached_property
    def _marks_turns(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", str(self.tokenizer.chat_template)) is not None

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        return special_texts(self.tokenizer)

    def _render_marked(self, messages: Messages, row_id: object) -> tuple[str, list[Span]]:
        # Imported here: nothing else of this package needs transformers itself, which takes seconds.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
            found = render_jinja_template(
                conversations=[messages],
                tools=list(self.tools) or None,
                chat_template=self.tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **special,
            )
        except Exception as error:  # a template is code of its own
            raise self._refusal(row_id, error) from error
        texts, marked = cast("tuple[list[str], list[list[Span]]]", found)
        self._check_tools(messages, texts[0], row_id)
        return texts[0], [(int(start), int(end)) for start, end in marked[0]]

    def _find_turn(self, row: JsonObject, number: int, text: str) -> Span:
        messages, row_id = row["messages"], row.get("id")
        before = self.render(messages[:number], row_id)
        through = self.render(messages[: number + 1], row_id, opens_answer=False)
        if not through.startswith(before) or not text.startswith(through):
            raise ValueError(
                f"{self.subject}: the tokenizer's chat template writes message {number + 1} of the conversation with "
                f"id {row_id!r} in another way once others follow, so it is not known which tokens are the "
                "assistant's; set dataset.turns=last, or mark them in the template with {% generation %}"
            )
        return len(before), max(len(self._end_with_turn(through)), len(before))

    def _end_with_turn(self, text: str) -> str:
        """Returns the text without the white space that a template writes after a turn's last token."""
        return text.rstrip() if self._ends_in_special(text) else text

    def _ends_in_special(self, text: str) -> bool:
        """Returns whether the last that a text has, white space aside, is a special token, which ends it."""
        return text.rstrip().endswith(self._special_texts)


def is_written(content: str, text: str) -> bool:
    """Returns whether a template's text has a message's content, as it is or in JSON."""
    return content.strip() in text or json.dumps(content, ensure_ascii=False)[1:-1].strip() in text


def prompt_texts(rows: Sequence[JsonObject], template: Template | None) -> list[str]:
    """Returns the rows' prompts as they are tokenised: themselves, or in the template."""
    if template is None:
        return [row["prompt"] + row.get(PROMPT_END, "") for row in rows]
    return [template.render(read_messages(row), row.get("id")) for row in rows]


def read_messages(row: JsonObject) -> Messages:
    """Returns the row's prompt as messages; a text is the user's."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def special_texts(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Returns the texts of all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return tuple({*(str(token) for token in added if token.special), *map(str, tokenizer.all_special_tokens)})


def shorten(messages: Messages, fits_fn: Callable[[Messages], bool]) -> Messages | None:
    """Returns the messages with as much text as fits; None where even none of it does.

    The longest message loses its beginning; where that is not enough, all of its text, and the next longest its
    beginning.
    """
    messages = list(messages)
    for index in sorted(range(len(messages)), key=lambda i: -len(messages[i]["content"])):
        whole = messages[index]

        def fits_with(length: int, index: int = index, whole: dict[str, str] = whole) -> bool:
            content = whole["content"]
            messages[index] = {**whole, "content": content[len(content) - length :]}
            return fits_fn(messages)

        num_fitting = bisect_left(range(len(whole["content"]) + 1), True, key=lambda length: not fits_with(length))
        if fits_with(max(num_fitting - 1, 0)):
            return messages
    return None
