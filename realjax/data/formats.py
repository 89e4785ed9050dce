"""The forms in which people keep data, recognised by their keys and brought into the form that each kind of run reads.

| task | what a row has afterwards |
|---|---|
| answers | `prompt` and `answer`; or `messages` and `num_given`, those that are not learned; or `text` |
| pairs | `prompt`, `pos_answers`, `neg_answers`: texts, or messages |
| labels | `prompt`, `answer` and `label` |
| prompts | `prompt` |
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from realjax.core.json_text import JsonObject
from realjax.data.chat import PROMPT_END, Messages
from realjax.data.files import Source

_log = logging.getLogger(__name__)

Task = Literal["answers", "pairs", "labels", "prompts"]
Convert = Callable[[JsonObject, str], JsonObject]
LABELS = {"true": True, "false": False, "1": True, "0": False}
_JSON_CHAT = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"\s*:')
# Who speaks, as ShareGPT and its descendants say it.
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),  # what a tool has answered
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One form of rows: the keys by which it is known, and the way to what the task reads."""

    keys: tuple[str, ...]
    convert: Convert
    means: str  # for the log


def _keep(row: JsonObject, place: str) -> JsonObject:
    return row


def _own(row: JsonObject, place: str) -> JsonObject:
    """ReaL's rows; only a list of messages of another spelling is brought into ours."""
    return {**row, "prompt": read_chat(row["prompt"], "prompt", place)} if _is_chat(row["prompt"]) else row


def _is_chat(value: object) -> bool:
    if isinstance(value, str):  # a .csv holds lists as their JSON
        return _JSON_CHAT.match(value) is not None
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def read_chat(value: object, key: str, place: str) -> Messages:
    """Returns messages with `role` and `content` from those, from ShareGPT's `from` and `value`, or from their JSON.

    Calls of tools have their arguments as objects. Raises ValueError for anything else, and for pictures.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{place}: {key!r} is a text that is no JSON list of messages ({error})") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {key!r} holds no messages; it needs a list of at least one")
    return [_read_message(message, f"{place}: message {n} of {key!r}") for n, message in enumerate(value, start=1)]


def _read_message(found: object, place: str) -> dict[str, str]:
    needed = "is not an object with the strings 'role' and 'content'"
    if not isinstance(found, dict):
        raise ValueError(f"{place} {needed}")
    message: JsonObject = {key: value for key, value in found.items() if value is not None}
    if "from" in message and "role" not in message:
        message = {"role": message["from"], "content": message.get("value")}
    role, content = message.get("role"), message.get("content")
    if role == "function_call":
        raise ValueError(
            f"{place} has the role function_call, whose text may call a tool in any form; write it as the assistant's, "
            "with tool_calls, or in the form that the model is to learn"
        )
    if message.get("tool_calls"):
        message["tool_calls"] = _read_calls(message["tool_calls"], place)
        content = "" if content is None else content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if any(part.get("type") != "text" for part in content):
            raise ValueError(f"{place} holds more than text (pictures or sound); realjax trains on texts only")
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{place} {needed}")
    return {**message, "role": _SPEAKERS.get(role, role), "content": content}


def _read_calls(found: object, place: str) -> list[JsonObject]:
    """Returns calls of tools, their arguments as objects: templates write them as JSON themselves."""
    needed = "has tool_calls; it needs to be a list of objects, each with 'function', its 'name' and 'arguments'"
    calls: list[JsonObject] = []
    for call in found if isinstance(found, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{place} {needed}")
        arguments = _read_json(function.get("arguments", {}), f"{place}: 'arguments' of a call")
        if not isinstance(arguments, dict):
            raise ValueError(f"{place} {needed}, an object or its JSON")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def _read_json(value: object, place: str) -> object:
    """Returns what a text of JSON holds; anything but a text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{place} is no JSON ({error})") from error


def _read_tools(row: JsonObject, place: str) -> JsonObject:
    """Returns the row's tools, descriptions in JSON schema, where it has any."""
    tools = _read_json(row.get("tools") or [], f"{place}: 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{place}: 'tools' is no list of objects, descriptions of tools in JSON schema")
    return {"tools": tools} if tools else {}


def _dialogue(key: str) -> Convert:
    def convert(row: JsonObject, place: str) -> JsonObject:
        messages = read_chat(row[key], key, place)
        ends = [i for i, message in enumerate(messages, start=1) if message["role"] == "assistant"]
        if not ends:
            raise ValueError(f"{place}: no message of {key!r} is the assistant's, so there is nothing to learn")
        tools = _read_tools(row, place)
        return {**_without_tools(row), **tools, "messages": messages[: ends[-1]], "num_given": 0}

    return convert


def _without_tools(row: JsonObject) -> JsonObject:
    return {key: value for key, value in row.items() if key != "tools"}


def _dialogue_prompt(key: str) -> Convert:
    def convert(row: JsonObject, place: str) -> JsonObject:
        messages = read_chat(row[key], key, place)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(f"{place}: all messages of {key!r} are the assistant's, so there is nothing to answer")
        return {**row, "prompt": messages}

    return convert


def _completion(row: JsonObject, place: str) -> JsonObject:
    """`prompt` and `completion`, texts or messages."""
    if not _is_chat(row["completion"]):
        return _own({**row, "answer": row["completion"]}, place)
    given = _as_messages(row["prompt"], "prompt", place)
    messages = [*given, *read_chat(row["completion"], "completion", place)]
    return {**row, "messages": messages, "num_given": len(given)}


def _as_messages(prompt: object, key: str, place: str) -> Messages:
    if isinstance(prompt, str) and not _is_chat(prompt):
        return [{"role": "user", "content": prompt}]
    return read_chat(prompt, key, place)


def _renamed(prompt: str, answer: str, end: str = "") -> Convert:
    return lambda row, place: _own({**row, "prompt": row[prompt], PROMPT_END: end, **_answer(row, answer)}, place)


def _answer(row: JsonObject, key: str) -> JsonObject:
    return {"answer": row[key]} if key in row else {}


def _instruction(row: JsonObject, place: str) -> JsonObject:
    """Alpaca's: the instruction, a blank line, the input where there is one."""
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{place}: 'instruction' or 'input' is no string")
    return {**row, "prompt": "\n\n".join(filter(None, parts)), PROMPT_END: "\n\n", **_answer(row, "output")}


def _labelled(convert: Convert) -> Convert:
    def labelled(row: JsonObject, place: str) -> JsonObject:
        row = convert(row, place)
        label = row.get("label")
        known = LABELS.get(str(label).lower()) if isinstance(label, str | int) else None
        return row if known is None else {**row, "label": known}

    return labelled


def _labelled_dialogue(row: JsonObject, place: str) -> JsonObject:
    messages = _dialogue("messages")(row, place)["messages"]
    return {**_without_tools(row), "prompt": messages[:-1], "answer": messages[-1:]}


def _labelled_completion(row: JsonObject, place: str) -> JsonObject:
    answer = row["completion"]
    answer = read_chat(answer, "completion", place) if _is_chat(answer) else answer
    return _own({**row, "answer": answer}, place)


def _choice(row: JsonObject, place: str) -> JsonObject:
    """`chosen` and `rejected`: answers to `prompt`, or whole conversations that part after their common beginning."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not _is_chat(chosen) or not _is_chat(rejected):
        return _choice_of_texts(row, place)
    better, worse = read_chat(chosen, "chosen", place), read_chat(rejected, "rejected", place)
    if better[0]["role"] == "assistant" and row.get("prompt"):
        prompt = _as_messages(row["prompt"], "prompt", place)
    else:
        pairs = zip(better[:-1], worse[:-1], strict=False)
        num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        prompt, better, worse = better[:num_common], better[num_common:], worse[num_common:]
    return {**_without_tools(row), "prompt": prompt, "pos_answers": [better], "neg_answers": [worse]}


def _choice_of_texts(row: JsonObject, place: str) -> JsonObject:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError(f"{place}: 'chosen' and 'rejected' are neither both texts nor both lists of messages")
    if prompt is None:
        common = os.path.commonprefix([chosen, rejected])
        num_common = max(common.rfind(space) for space in " \n") + 1
        num_common -= common[num_common - 1 : num_common] == " "  # the space is the answer's, as tokenizers have it
        prompt, chosen, rejected = chosen[:num_common], chosen[num_common:], rejected[num_common:]
    return _own({**row, "prompt": prompt, "pos_answers": [chosen], "neg_answers": [rejected]}, place)


_PROMPT_ONLY = (
    Format(keys=("prompt",), convert=_own, means="prompts"),
    Format(keys=("messages",), convert=_dialogue_prompt("messages"), means="conversations, up to the last answer"),
    Format(keys=("conversations",), convert=_dialogue_prompt("conversations"), means="ShareGPT's conversations"),
    Format(keys=("instruction",), convert=_instruction, means="instructions, with their input where there is one"),
    Format(keys=("question",), convert=_renamed("question", "answer", "\n"), means="questions"),
)
FORMATS: Mapping[Task, Sequence[Format]] = {
    "answers": (
        Format(keys=("prompt", "answer"), convert=_own, means="prompts and their answers"),
        Format(keys=("messages",), convert=_dialogue("messages"), means="conversations"),
        Format(keys=("conversations",), convert=_dialogue("conversations"), means="ShareGPT's conversations"),
        Format(keys=("prompt", "completion"), convert=_completion, means="prompts and their completions"),
        Format(keys=("instruction", "output"), convert=_instruction, means="instructions and their outputs"),
        Format(
            keys=("question", "answer"), convert=_renamed("question", "answer", "\n"), means="questions and answers"
        ),
        Format(keys=("prompt", "response"), convert=_renamed("prompt", "response"), means="prompts and responses"),
        Format(keys=("text",), convert=_keep, means="plain texts, learned whole"),
    ),
    "pairs": (
        Format(keys=("prompt", "pos_answers", "neg_answers"), convert=_own, means="prompts and pairs of answers"),
        Format(keys=("chosen", "rejected"), convert=_choice, means="chosen and rejected answers"),
    ),
    "labels": (
        Format(keys=("prompt", "answer", "label"), convert=_labelled(_own), means="labelled answers"),
        Format(
            keys=("prompt", "completion", "label"),
            convert=_labelled(_labelled_completion),
            means="labelled completions",
        ),
        Format(keys=("messages", "label"), convert=_labelled(_labelled_dialogue), means="labelled conversations"),
    ),
    "prompts": _PROMPT_ONLY,
}


# Whose rows are of a task, the most telling keys first.
READERS: Mapping[Task, str] = {
    "pairs": "rw, dpo, simpo and orpo",
    "labels": "kto",
    "answers": "sft",
    "prompts": "gen, ppo, grpo and their like",
}


def name_formats(task: Task) -> str:
    """Returns the sets of keys that a task knows, for messages."""
    return "; ".join(" and ".join(one.keys) for one in FORMATS[task])


def explain_reader(row: JsonObject) -> str:
    """Returns who reads such a row as it is, for messages; nothing where nobody does."""
    for task, readers in READERS.items():
        if any(all(key in row for key in one.keys) for one in FORMATS[task]):
            return f"; as they are, {readers} read such rows"
    return ""


@dataclass(kw_only=True)
class Converter:
    """Brings the rows of one source into the form that a task reads; the first row says which form they have."""

    task: Task
    source: Source
    form: Format | None = None
    is_chat: bool = False  # the first row's prompt is messages
    _first: JsonObject = field(default_factory=dict)

    def __call__(self, row: JsonObject, place: str) -> JsonObject:
        """Returns the row converted; ValueError for one that is of another form than the first."""
        if self.form is None:
            self.form = next((one for one in FORMATS[self.task] if all(key in row for key in one.keys)), None)
            if self.form is None:
                found = ", ".join(map(str, row)) or "none"
                raise ValueError(
                    f"{place}: no known set of keys (found: {found}); needed {name_formats(self.task)} (docs/data.md)"
                    + explain_reader(row)
                )
        if missing := [key for key in self.form.keys if key not in row]:
            found = ", ".join(map(str, row)) or "none"
            raise ValueError(
                f"{place}: no key {missing[0]!r} (found: {found}); every row needs the keys of the first, "
                f"{' and '.join(self.form.keys)}"
            )
        converted = self.form.convert(row, place)
        if not self._first:
            self._first = converted
            self.is_chat = "messages" in converted or isinstance(converted.get("prompt"), list)
        return converted

    def tell(self) -> None:
        """Logs the form of the rows, in a line."""
        if self.form is not None:
            is_told = "messages" in self._first
            what = "told to the chat template" if is_told else "left out"
            tools = f"; their tools are {what}" if "tools" in self._first else ""
            keys = " and ".join(self.form.keys)
            _log.info("%s: rows with %s: %s%s", self.source.subject, keys, self.form.means, tools)
