"""One value: text of the command line, or a value of a recipe, to the type that an option is annotated with."""

import json
import math
import re
import types
from collections.abc import Callable
from typing import Literal, SupportsFloat, Union, get_args, get_origin

NULL_TEXTS = ("null", "None", "none", "~")
BOOL_TEXTS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
# A backslash before one of these is Hydra's or the shell's escape; before anything else it belongs to the value.
ESCAPED = re.compile(r"\\(?=[\\'\",:=()\[\]{} ])")
# A text in quotes, and an item of a list, in quotes or bare, with the comma behind it.
QUOTED = re.compile(r"""\s*(['"])((?:\\.|(?!\1)[^\\])*)\1\s*""", re.DOTALL)
ITEM = re.compile(rf"(?:{QUOTED.pattern}|((?:\\.|[^,\\])*\\?))(?:,|\Z)", re.DOTALL)
BRACKETS = ("[]", "()")


class Verbatim(str):
    """A text that is the value already: without quotes and escapes to be taken off."""


LONGEST_SHOWN = 200  # characters of a value in an error
MOST_DIGITS = 18  # Python reads no more than 4,300, and nothing here counts beyond 64 bits


def convert(value: object, annotation: object, name: str) -> object:
    """Returns `value` as the annotated type. ValueError naming option, value and needed type when it is not one."""
    members = optional_members(annotation)
    if members is not None:
        if value is None or value in NULL_TEXTS:
            return None
        annotation = members
    origin = get_origin(annotation)
    if origin is Literal:
        return _choice(value, annotation, name)
    if origin in (list, tuple):
        return origin(convert(item, get_args(annotation)[0], name) for item in _split_list(value, annotation, name))
    return _CONVERTERS[annotation](value, name)


def optional_members(annotation: object) -> object:
    """Returns X for the annotation `X | None`, and None for any other."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return None
    members = [member for member in get_args(annotation) if member is not types.NoneType]
    if len(members) != 1:
        raise TypeError(f"{annotation}: an option holds one type, or one type and None")
    return members[0]


def type_label(annotation: object) -> str:
    """Returns the type as help and errors name it, such as `int or null` or `adam|empty`."""
    members = optional_members(annotation)
    if members is not None:
        return f"{type_label(members)} or null"
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        return f"list of {type_label(get_args(annotation)[0])}"
    assert isinstance(annotation, type), f"{annotation}: an option is of a plain type"
    return annotation.__name__


def unquote(text: str) -> str:
    """Returns `text` without the escapes and the outer quotes that Hydra's grammar asks for."""
    text = ESCAPED.sub("", text)
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def wrong_type(name: str, value: object, needed: str) -> ValueError:
    """Returns the error that says what the option `name` was given and what it needs."""
    found = "null" if value is None else repr(value)
    found = found if len(found) <= LONGEST_SHOWN else f"{found[:LONGEST_SHOWN]}..."
    return ValueError(f"{name}: found {found}; it needs {needed}")


def _to_bool(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return value
    known = BOOL_TEXTS.get(unquote(value).lower() if isinstance(value, str) else str(value))
    if known is None:
        raise wrong_type(name, value, "bool (True or False)")
    return known


def _to_int(value: object, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**MOST_DIGITS:
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(_\d+)*", text := unquote(value)):
        if len(text) <= MOST_DIGITS:
            return int(text)
        raise wrong_type(name, value, f"int of at most {MOST_DIGITS} digits")
    raise wrong_type(name, value, "int (a whole number such as 1 or 1_000)")


def _to_float(value: object, name: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, str | SupportsFloat):
            raise TypeError
        number = float(unquote(value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise wrong_type(name, value, "float (a number such as 0.1 or 1e-5)") from None
    if not math.isfinite(number):
        raise wrong_type(name, value, "a finite float")
    return number


def _to_str(value: object, name: str) -> str:
    if isinstance(value, Verbatim):
        return str(value)
    if not isinstance(value, str) or value in NULL_TEXTS:
        raise wrong_type(name, value, "str")
    return unquote(value)


_Converter = Callable[[object, str], object]
_CONVERTERS: dict[object, _Converter] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}


def _choice(value: object, annotation: object, name: str) -> object:
    text = unquote(value) if isinstance(value, str) else str(value)
    for choice in get_args(annotation):
        if text == str(choice):
            return choice
    raise wrong_type(name, value, f"one of {', '.join(str(choice) for choice in get_args(annotation))}")


def _split_list(value: object, annotation: object, name: str) -> list[object]:
    """Returns a list's items: a recipe's as they are, those of a text by the quotes of Python, JSON or Hydra."""
    if isinstance(value, list | tuple):
        return [Verbatim(item) if isinstance(item, str) else item for item in value]
    if not isinstance(value, str):
        raise wrong_type(name, value, type_label(annotation))
    text = ESCAPED.sub("", value) if value.startswith("\\") else value
    if (whole := QUOTED.fullmatch(text)) is not None:
        text = _quoted(whole)
        if text[:1] + text[-1:] not in BRACKETS:
            return [Verbatim(text)]
    inner = text.strip()
    if inner[:1] + inner[-1:] in BRACKETS:
        inner = inner[1:-1]
    items, at = [], 0
    while inner[at:].strip():
        match = ITEM.match(inner, at)
        assert match is not None, "anything up to a comma is an item"
        items.append(Verbatim(_quoted(match)) if match[3] is None else match[3].strip())
        at = match.end()
    return items


def _quoted(match: re.Match[str]) -> str:
    """Returns the text between quotes; \\n, \\t, \\u00e9 and so on are what they are in JSON and Python."""
    # To JSON's quotes; a backslash that escapes nothing is one.
    body = re.sub(r"\\(?P<next>.)|\"", _as_json, match[2], flags=re.DOTALL)
    try:
        return json.loads(f'"{body}"', strict=False)
    except ValueError:  # \u without four digits
        return match[2]


def _as_json(match: re.Match[str]) -> str:
    escaped = match["next"]
    if escaped == "'":
        return "'"
    return match[0] if escaped and escaped in '"\\/bfnrtu' else f"\\{match[0]}"
