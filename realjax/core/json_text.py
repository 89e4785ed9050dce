"""JSON that people give: every way in which it can be wrong is one error that says what and where."""

import json
import re
from typing import Any

# What stands behind a key is what the writer meant it to be: who reads it checks it first.
JsonObject = dict[str, Any]

# Python refuses to read longer integers, without saying where they stand.
_LONGEST_INTEGER = 4300
_HUGE_INTEGER = re.compile(rf"\d{{{_LONGEST_INTEGER + 1}}}")


def parse_json(raw: bytes, *, encoding: str = "utf-8") -> Any:
    """Returns the value of a JSON text. Raises ValueError, whose text is the cause and its place, and nothing else."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte {raw[error.start]:#04x}" + (f" on line {line}" if b"\n" in raw else "")
        raise ValueError(f"not UTF-8 text ({found}); save the file as UTF-8") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if b"\n" in raw else f"column {error.colno}"
        raise ValueError(f"malformed JSON ({error.msg} at {at})") from error
    except RecursionError as error:
        raise ValueError("malformed JSON (lists or objects inside each other, too many to read)") from error
    except ValueError as error:
        huge = _HUGE_INTEGER.search(text)
        at = f" on line {text.count(chr(10), 0, huge.start()) + 1}" if huge and "\n" in text else ""
        raise ValueError(f"malformed JSON (an integer of more than {_LONGEST_INTEGER} digits{at})") from error
