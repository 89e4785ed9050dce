"""How a model calls a tool in its answer's text: in the form that its chat template writes calls in."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os.path import commonprefix

from realjax.core.json_text import JsonObject

# render_fn(messages, opens_answer) -> the template's text of messages; whatever it raises is a refusal.
RenderFn = Callable[[list[JsonObject], bool], str]
_NAME, _KEY, _VALUE = "some_tool", "some_key", "some value"
# Messages name the call that they answer, where templates ask for it: nine letters or digits are enough for all.
CALL_ID = "call00000"


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool's name and what it is given."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """A call is a JSON object with the tool's name and its arguments, between two texts.

    `has_role`: the template knows messages of the role `tool`. Otherwise a result is the user's message, in tags.
    """

    before: str = "<tool_call>\n"
    after: str = "\n</tool_call>"
    arguments: str = "arguments"  # the key
    has_role: bool = False

    def find_calls(self, answer: str) -> list[ToolCall]:
        """Returns the calls in an answer's text, in order; what is no such JSON object is none."""
        return list(self._read_calls(answer))

    def _read_calls(self, answer: str) -> Iterator[ToolCall]:
        opening, at = re.compile(re.escape(self.before.strip()) + r"\s*(?=\{)"), 0
        while (match := opening.search(answer, at)) is not None:
            try:
                found, at = json.JSONDecoder().raw_decode(answer, match.end())
            except ValueError:
                at = match.end() + 1
                continue
            if isinstance(found.get("name"), str) and isinstance(found.get(self.arguments, {}), dict):
                yield ToolCall(name=found["name"], arguments=found.get(self.arguments, {}))

    def write(self, call: ToolCall) -> str:
        """Returns a call's text."""
        return self.before + json.dumps({"name": call.name, self.arguments: dict(call.arguments)}) + self.after

    def reply(self, name: str, content: str) -> dict[str, str]:
        """Returns the message with a tool's result."""
        if self.has_role:
            return {"role": "tool", "name": name, "tool_call_id": CALL_ID, "content": content}
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}


# What templates of the Hermes kind write, and what is taken where a template has no form of its own.
HERMES = ToolFormat()


def find_format(render_fn: RenderFn) -> ToolFormat:
    """Returns the form in which a chat template writes calls; HERMES where it writes none.

    A template is asked: it renders a call, and the JSON object is found in what it wrote.
    """
    asked: JsonObject = {"role": "user", "content": "hello"}
    call = {"type": "function", "id": CALL_ID, "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
    try:
        opened = render_fn([asked], True)
        text = render_fn([asked, {"role": "assistant", "content": "", "tool_calls": [call]}], False)
        plain = render_fn([asked, {"role": "assistant", "content": _VALUE}], False)
    except Exception:  # a template is code of its own, and need not know tools
        return HERMES
    found = _find_call(text, first=len(commonprefix([opened, text])))
    if found is None:
        return HERMES
    begin, end, arguments = found
    ending = plain.rpartition(_VALUE)[2]  # what ends any answer
    return ToolFormat(
        before=text[len(commonprefix([opened, text])) : begin],
        after=text[end:].removesuffix(ending),
        arguments=arguments,
        has_role=_shows_results(render_fn, asked),
    )


def _find_call(text: str, first: int) -> tuple[int, int, str] | None:
    """Returns where the call's JSON object begins and ends, and the key of its arguments."""
    begin = text.find("{", first)
    while begin >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, begin)
        except ValueError:
            found, end = None, begin
        if isinstance(found, dict) and found.get("name") == _NAME:
            keys = [key for key, value in found.items() if isinstance(value, dict) and _KEY in value]
            return (begin, end, keys[0]) if keys else None
        begin = text.find("{", begin + 1)
    return None


def _shows_results(render_fn: RenderFn, asked: JsonObject) -> bool:
    result = {"role": "tool", "name": _NAME, "tool_call_id": CALL_ID, "content": _VALUE}
    try:
        return _VALUE in render_fn([asked, {"role": "assistant", "content": "so"}, result], True)
    except Exception:  # as above
        return False
