"""Rows of data, checked, with errors that name the file and the line."""

import json
import logging
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

import numpy as np

from realjax.core.json_text import JsonObject
from realjax.data.files import Source, name_type, read_rows, type_name

_log = logging.getLogger(__name__)

# JSON can spell half of a surrogate pair, which no tokenizer accepts.
_HALF_PAIR = re.compile("[\ud800-\udfff]")

Kinds = type | tuple[type, ...]
CheckFn = Callable[[JsonObject, str], None]  # fn(row, where it stands) raises for a row that cannot serve
KindsFn = Callable[[JsonObject], Mapping[str, Kinds]]  # fn(row) -> the keys that such a row needs
ConvertFn = Callable[[JsonObject, str], JsonObject]  # fn(row, where it stands) -> the row with the keys that are needed


def load_rows(
    path: str | Source,
    required: Mapping[str, Kinds],
    name: str = "dataset.train_path",
    check_fn: CheckFn | None = None,
) -> list[JsonObject]:
    """Objects of a data file, each with the required keys (of one type or several) and a unique `id`.

    When any row lacks an id, all rows get 0..N-1 and one warning is logged. Blank lines of a .jsonl are skipped.
    Raises ValueError naming `name` (the option that holds the path), the file, and the line or list item, from 1;
    `check_fn(row, that subject)` may raise more.
    """
    source = Source(path=path, name=name) if isinstance(path, str) else path
    reader = RowReader(source=source, required=required, check_fn=check_fn)
    rows = list(reader)
    return [{**row, "id": number} for number, row in enumerate(rows)] if reader.finish() else rows


@dataclass(kw_only=True)
class RowReader:
    """Reads a source row by row: converted, checked, none of them kept. `finish` comes after the last one."""

    source: Source
    required: Mapping[str, Kinds] | KindsFn
    check_fn: CheckFn | None = None
    convert_fn: ConvertFn | None = None
    _hashes: array = field(default_factory=lambda: array("q"))
    _without_id: str | None = None
    num_rows: int = 0

    def __iter__(self) -> Iterator[JsonObject]:
        subject, convert_fn = self.source.subject, self.convert_fn
        for place, value in islice(read_rows(self.source), self.source.max_rows):
            where = f"{subject} {place}"
            if convert_fn is not None and isinstance(value, dict):
                value = convert_fn(value, where)
            row = _check_row(value, self._find_kinds(value), where)
            if self.check_fn is not None:
                self.check_fn(row, where)
            self._note_id(row.get("id"), place)
            self.num_rows += 1
            yield row
        if not self.num_rows:
            raise ValueError(f"{subject} holds no rows; it needs at least one object{self._say_kinds()}")

    def _find_kinds(self, row: object) -> Mapping[str, Kinds]:
        if isinstance(self.required, Mapping):
            return self.required
        return self.required(row if isinstance(row, dict) else {})

    def _say_kinds(self) -> str:
        return f" with {_wanted(self.required)}" if isinstance(self.required, Mapping) else ""

    def _note_id(self, row_id: object, place: str) -> None:
        if row_id is None:
            self._without_id = self._without_id or place
        elif not self._without_id:
            if not isinstance(row_id, str | int):
                kind = type_name(row_id)
                raise ValueError(f"{self.source.subject} {place}: 'id' has type {kind}; needed a string or an integer")
            self._hashes.append(_hash_id(row_id))

    def finish(self) -> bool:
        """Returns whether rows are to be numbered, since one lacks an id. ValueError where two rows have the same."""
        if self._without_id is not None:
            _log.warning(
                "%s: no id in %s; all %d rows get ids 0 to %d",
                *(self.source.subject, self._without_id, self.num_rows, self.num_rows - 1),
            )
            return True
        if len(np.unique(np.frombuffer(self._hashes, np.int64))) < self.num_rows:
            self._refuse_repeats()
        return False

    def _refuse_repeats(self) -> None:
        # Only now are the places of ids needed, so the file is read again.
        places: dict[str | int, str] = {}
        for place, row in islice(read_rows(self.source), self.source.max_rows):
            row_id = row["id"] if isinstance(row, dict) else ""
            if row_id in places:
                raise ValueError(
                    f"{self.source.subject} {place}: id {row_id!r} was used by {places[row_id]} already; "
                    "make ids unique, or leave 'id' out of every row"
                )
            places[row_id] = place


def _hash_id(row_id: str | int) -> int:
    return int.from_bytes(blake2b(repr(row_id).encode(errors="surrogatepass"), digest_size=8).digest(), signed=True)


def _check_row(row: object, required: Mapping[str, Kinds], subject: str) -> JsonObject:
    if not isinstance(row, dict):
        raise ValueError(f"{subject}: found a JSON {type_name(row)}; needed an object with {_wanted(required)}")
    for key, needed in required.items():
        if key not in row:
            found = ", ".join(row) or "none"
            raise ValueError(f"{subject}: no key {key!r} (found: {found}); every row needs {_wanted(required)}")
        value = row[key]
        if not isinstance(value, needed):
            raise ValueError(f"{subject}: {key!r} has type {type_name(value)}; every row needs {_wanted(required)}")
        if _HALF_PAIR.search(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)):
            raise ValueError(f"{subject}: {key!r} holds half of a surrogate pair (\\ud800 to \\udfff); remove it")
    return row


def _wanted(required: Mapping[str, Kinds]) -> str:
    kinds = {key: needed if isinstance(needed, tuple) else (needed,) for key, needed in required.items()}
    names = {key: " or ".join(name_type(kind) for kind in needed) for key, needed in kinds.items()}
    return "the keys " + " and ".join(f"{key!r} ({name})" for key, name in names.items())
