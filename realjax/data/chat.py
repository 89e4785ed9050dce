"""Prompts in a tokenizer's chat template, up to where the answer begins."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from realjax.core.json_text import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


def prompt_kinds(tokenizer: "PreTrainedTokenizerBase", use_chat_template: bool) -> type | tuple[type, ...]:
    """Returns the types that a row's prompt may have. Raises ValueError for a template that the tokenizer lacks."""
    if use_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"dataset.use_chat_template: the tokenizer {tokenizer.name_or_path!r} has no chat template; set it to "
            "False, or use the checkpoint of a chat model"
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


def prompt_texts(
    rows: Sequence[JsonObject], tokenizer: "PreTrainedTokenizerBase", *, use_chat_template: bool, subject: str
) -> list[str]:
    """Returns the rows' prompts as they are tokenised: themselves, or in the template."""
    if not use_chat_template:
        return [row["prompt"] for row in rows]
    return [render(read_messages(row), row["id"], tokenizer, subject) for row in rows]


def read_messages(row: JsonObject) -> Messages:
    """Returns the row's prompt as messages; a text is the user's."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def render(messages: Messages, row_id: str | int, tokenizer: "PreTrainedTokenizerBase", subject: str) -> str:
    """Returns the text of a row's messages in the template, the assistant's turn opened."""
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is code of its own
        raise ValueError(
            f"{subject}: the tokenizer's chat template refuses the prompt with id {row_id!r} ({error}); mend its "
            "messages, or set dataset.use_chat_template=False"
        ) from error


def shorten(messages: Messages, fits_fn: Callable[[Messages], bool]) -> Messages | None:
    """Returns the messages with as much text as fits; None where even none of it does.

    The longest message loses its end; where that is not enough, all of its text, and the next longest its end.
    """
    messages = list(messages)
    for index in sorted(range(len(messages)), key=lambda i: -len(messages[i]["content"])):
        whole = messages[index]

        def fits_with(length: int, index: int = index, whole: dict[str, str] = whole) -> bool:
            messages[index] = {**whole, "content": whole["content"][:length]}
            return fits_fn(messages)

        num_fitting = bisect_left(range(len(whole["content"]) + 1), True, key=lambda length: not fits_with(length))
        if fits_with(max(num_fitting - 1, 0)):
            return messages
    return None
