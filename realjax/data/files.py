"""Rows of .jsonl, .json, .csv and .parquet files, of directories of them, and of datasets of the hub."""

import csv
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realjax.core.data_paths import NEEDED, find_fault, is_hub_name, is_saved_dataset, list_data_files
from realjax.core.json_text import parse_json

_log = logging.getLogger(__name__)

Located = tuple[str, object]  # where a row stands, for messages, and the row
_ROWS_PER_READ = 4096


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from: a path or a name, a part of it, and the option that holds it, which messages begin with."""

    path: str
    name: str = "dataset.train_path"
    split: str | None = None  # of a hub's dataset, or the files of a directory whose names begin with it
    max_rows: int | None = None  # the first ones
    cache: Path | None = None  # where tokens are kept between runs; None keeps none

    @property
    def subject(self) -> str:
        """How messages name it."""
        return f"{self.name}: {self.path!r}"


def read_rows(source: Source) -> Iterator[Located]:
    """Yields the rows of a source, one at a time, with their places: `line 3`, `item 3`, `part.csv row 3`.

    Raises ValueError, which begins with the source's subject, for what cannot be read.
    """
    if not source.path:
        raise ValueError(f"{source.name}: no path given; set it to {NEEDED}")
    if (fault := find_fault(source.path)) is not None:
        raise ValueError(f"{source.subject} {fault}; set it to {NEEDED}")
    place = Path(source.path).expanduser()
    if place.is_file():
        yield from _read_file(place, source.subject)
    elif place.is_dir() and not is_saved_dataset(place):
        for file in choose_files(source):
            inside = file.relative_to(place).as_posix()
            yield from ((f"{inside} {at}", row) for at, row in _read_file(file, f"{source.subject} {inside}"))
    else:
        yield from ((f"row {n}", row) for n, row in enumerate(load_hub_dataset(source), start=1))


def choose_files(source: Source) -> list[Path]:
    """Returns the files of a directory that the split names; ValueError where none does."""
    folder = Path(source.path).expanduser()
    files = list_data_files(folder)
    if source.split is None:
        return files
    chosen = [f for f in files if any(part.startswith(source.split) for part in f.relative_to(folder).parts)]
    if not chosen:
        names = ", ".join(f.relative_to(folder).as_posix() for f in files[:5])
        raise ValueError(
            f"{source.subject}: no file begins with the split {source.split!r} (found: {names}); correct the split, or "
            "leave it out to read all files"
        )
    return chosen


def load_hub_dataset(source: Source) -> Any:
    """Returns a dataset of the library `datasets`: its own directory, the hub's cache, or the hub itself.

    Raises ValueError where the library is missing, or finds nothing of that name and split.
    """
    if importlib.util.find_spec("datasets") is None:
        what = "names a dataset of the hub" if is_hub_name(source.path) else "was saved by the library datasets"
        raise ValueError(
            f"{source.subject} is no file here, and {what}, which needs the extra: pip install 'realjax[data]'"
        )
    library = importlib.import_module("datasets")
    path, _, subset = source.path.partition(":")
    split = source.split or "train"
    try:
        if not Path(source.path).expanduser().is_dir():
            return library.load_dataset(path, subset or None, split=split)
        found = library.load_from_disk(str(Path(source.path).expanduser()))
        return found[split] if isinstance(found, dict) else found
    except Exception as error:  # the library's, and those of each host and file system
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{source.subject}: the library datasets cannot load its split {split!r} ({reason}); correct the name, the "
            "subset (owner/name:subset) or the split, or download it where there is a network"
        ) from error


def _read_file(file: Path, subject: str) -> Iterator[Located]:
    try:
        yield from _READERS[file.suffix](file, subject)
    except OSError as error:
        raise ValueError(f"{subject} cannot be read ({error.strerror or error}); check its permissions") from error


def _read_jsonl(file: Path, subject: str) -> Iterator[Located]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                line = line.removesuffix(b"\n")
                yield f"line {number}", _parse(line, f"{subject} line {number}", "every line must be one JSON object")


def _read_json(file: Path, subject: str) -> Iterator[Located]:
    content = file.read_bytes()
    if _has_object_lines(content):
        yield from _read_jsonl(file, subject)
        return
    value = _parse(content, subject, "the file must be one JSON list of objects")
    if not isinstance(value, list):
        raise ValueError(
            f"{subject} holds a JSON {type_name(value)}; a .json file needs one list of objects "
            "(name it .jsonl when every line is an object)"
        )
    yield from ((f"item {number}", row) for number, row in enumerate(value, start=1))


def _has_object_lines(content: bytes) -> bool:
    """Returns whether a .json file holds JSON lines, as many on the hub do: two objects or more, each on its line."""
    lines = [line for line in content[: 2**20].lstrip(b"\xef\xbb\xbf").split(b"\n", 2)[:2] if line.strip()]
    return len(lines) == 2 and all(line.lstrip().startswith(b"{") for line in lines) and lines[0].strip().endswith(b"}")


def _parse(raw: bytes, subject: str, needed: str) -> object:
    try:
        return parse_json(raw, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{subject}: {error}; {needed}") from error


def _read_csv(file: Path, subject: str) -> Iterator[Located]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(
                        f"{subject} {place}: found another number of fields than the {len(reader.fieldnames or ())} "
                        "of the first line, which names them; put texts with commas or line breaks in quotes"
                    )
                yield place, dict(row)
        except csv.Error as error:
            raise ValueError(f"{subject} line {reader.line_num}: malformed CSV ({error}); mend its quotes") from error
        except UnicodeDecodeError as error:
            found = f"byte {error.object[error.start]:#04x}"
            raise ValueError(f"{subject}: not UTF-8 text ({found}); save the file as UTF-8") from error


def _read_parquet(file: Path, subject: str) -> Iterator[Located]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{subject} is a .parquet file, which needs the extra: pip install 'realjax[data]'")
    parquet = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS_PER_READ):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except importlib.import_module("pyarrow").ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{subject}: no whole Parquet file ({reason}); write or download it again") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Located]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "list", dict: "object"}


def type_name(value: object) -> str:
    """Returns the name of a value's JSON type."""
    return "null" if value is None else name_type(type(value))


def name_type(kind: type) -> str:
    """Returns JSON's name of a Python type; a type that JSON lacks keeps its own."""
    return _TYPE_NAMES.get(kind, kind.__name__)
