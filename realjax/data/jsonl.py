"""Rows of .json and .jsonl files, checked, with errors that name the file and the line."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from realjax.core.json_text import JsonObject, parse_json

_log = logging.getLogger(__name__)

# JSON can spell half of a surrogate pair, which no tokenizer accepts.
_HALF_PAIR = re.compile("[\ud800-\udfff]")

Kinds = type | tuple[type, ...]
CheckFn = Callable[[JsonObject, str], None]  # fn(row, where it stands) raises for a row that cannot serve
_TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "list", dict: "object"}


def load_rows(
    path: str,
    required: Mapping[str, Kinds],
    name: str = "dataset.train_path",
    check_fn: CheckFn | None = None,
) -> list[JsonObject]:
    """Objects of a .json list or a .jsonl file, each with the required keys (of one type or several) and a unique `id`.

    When any row lacks an id, all rows get 0..N-1 and one warning is logged. Blank lines of a .jsonl are skipped.
    Raises ValueError naming `name` (the option that holds the path), the file, and the line or list item, from 1;
    `check_fn(row, that subject)` may raise more.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json}
    if not path:
        raise ValueError(f"{name}: no path given; set it to a .json or .jsonl file")
    file = Path(path).expanduser()
    if file.suffix not in readers:
        raise ValueError(f"{name}: {path!r} has extension {file.suffix!r}; needed a .json or .jsonl file")
    if not file.is_file():
        found = "is not a file" if file.exists() else "does not exist"
        raise ValueError(f"{name}: {path!r} {found}; set it to a .json or .jsonl file")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: {path!r} cannot be read ({error.strerror}); check its permissions") from error

    subject = f"{name}: {path!r}"
    located = list(readers[file.suffix](content, subject))
    if not located:
        raise ValueError(f"{subject} holds no rows; it needs at least one object with {_wanted(required)}")
    checked = [(place, _check_row(row, required, f"{subject} {place}")) for place, row in located]
    if check_fn is not None:
        for place, row in checked:
            check_fn(row, f"{subject} {place}")
    return _with_ids(checked, subject)


def _read_jsonl(content: bytes, subject: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", _parse(line, f"{subject} line {number}", "every line must be one JSON object")


def _read_json(content: bytes, subject: str) -> Iterator[tuple[str, object]]:
    value = _parse(content, subject, "the file must be one JSON list of objects")
    if not isinstance(value, list):
        raise ValueError(
            f"{subject} holds a JSON {_type_name(value)}; a .json file needs one list of objects "
            "(name it .jsonl when every line is an object)"
        )
    yield from ((f"item {number}", row) for number, row in enumerate(value, start=1))


def _parse(raw: bytes, subject: str, needed: str) -> object:
    try:
        return parse_json(raw, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{subject}: {error}; {needed}") from error


def _check_row(row: object, required: Mapping[str, Kinds], subject: str) -> JsonObject:
    if not isinstance(row, dict):
        raise ValueError(f"{subject}: found a JSON {_type_name(row)}; needed an object with {_wanted(required)}")
    for key, needed in required.items():
        if key not in row:
            found = ", ".join(row) or "none"
            raise ValueError(f"{subject}: no key {key!r} (found: {found}); every row needs {_wanted(required)}")
        value = row[key]
        if not isinstance(value, needed):
            raise ValueError(f"{subject}: {key!r} has type {_type_name(value)}; every row needs {_wanted(required)}")
        if _HALF_PAIR.search(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
            raise ValueError(f"{subject}: {key!r} holds half of a surrogate pair (\\ud800 to \\udfff); remove it")
    return row


def _with_ids(located: list[tuple[str, JsonObject]], subject: str) -> list[JsonObject]:
    lacking = next((place for place, row in located if row.get("id") is None), None)
    if lacking is not None:
        _log.warning("%s: no id in %s; all %d rows get ids 0 to %d", subject, lacking, len(located), len(located) - 1)
        return [{**row, "id": number} for number, (_, row) in enumerate(located)]
    places: dict[str | int, str] = {}
    for place, row in located:
        row_id = row["id"]
        if not isinstance(row_id, str | int):
            raise ValueError(f"{subject} {place}: 'id' has type {_type_name(row_id)}; needed a string or an integer")
        if row_id in places:
            raise ValueError(
                f"{subject} {place}: id {row_id!r} was used by {places[row_id]} already; "
                "make ids unique, or leave 'id' out of every row"
            )
        places[row_id] = place
    return [row for _, row in located]


def _type_name(value: object) -> str:
    return "null" if value is None else _TYPE_NAMES[type(value)]


def _wanted(required: Mapping[str, Kinds]) -> str:
    kinds = {key: needed if isinstance(needed, tuple) else (needed,) for key, needed in required.items()}
    names = {key: " or ".join(_TYPE_NAMES[kind] for kind in needed) for key, needed in kinds.items()}
    return "the keys " + " and ".join(f"{key!r} ({name})" for key, name in names.items())
