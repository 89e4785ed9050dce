"""Arrays that are written piece by piece and read whole: in memory, or in files that are mapped into it."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np

from realjax.core.identity import digest
from realjax.core.json_text import JsonObject

_BYTES, _ENDS = ".bytes", ".ends"
T = TypeVar("T")


class Writer:
    """Takes pieces of named 1-d arrays; with a folder they go to its files, so that they need no memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._pieces: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._dtypes: dict[str, str] = {}
        self._ends: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds a piece to the array of that name; all pieces of one have one dtype."""
        if self.folder is None:
            self._pieces.setdefault(name, []).append(values)
            return
        if name not in self._files:
            self._files[name] = (self.folder / name).open("wb")
            self._dtypes[name] = values.dtype.str
        self._files[name].write(np.ascontiguousarray(values).data)

    def append_lines(self, name: str, values: Iterable[object]) -> None:
        """Adds values that JSON can hold; `Store.lines` gives them back one by one."""
        texts = [json.dumps(value, ensure_ascii=False, default=str).encode(errors="surrogatepass") for value in values]
        ends = self._ends.get(name, 0) + np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._ends[name] = int(ends[-1]) if len(ends) else self._ends.get(name, 0)
        self.append(name + _BYTES, np.frombuffer(b"".join(texts), np.uint8))
        self.append(name + _ENDS, ends)

    def finish(self, facts: JsonObject) -> "Store":
        """Returns what was written, with `facts` beside it; the files are on the disk then, whole."""
        if self.folder is None:
            return Store(arrays={name: np.concatenate(pieces) for name, pieces in self._pieces.items()}, facts=facts)
        self.close()
        arrays = {name: map_array(self.folder / name, dtype) for name, dtype in self._dtypes.items()}
        store = Store(arrays=arrays, facts=facts)
        manifest = {"dtypes": self._dtypes, "facts": facts, "digest": store.digest}
        (self.folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        return store

    def close(self) -> None:
        """Closes the files, finished or not."""
        for file in self._files.values():
            file.close()


MANIFEST = "manifest.json"


def map_array(file: Path, dtype: str) -> np.ndarray:
    """Returns the numbers of a file, mapped into memory. ValueError for a size that is no multiple of one's."""
    return np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)


@dataclass(frozen=True, eq=False)
class Store:
    """Named 1-d arrays, and facts about them."""

    arrays: Mapping[str, np.ndarray]
    facts: JsonObject

    @cached_property
    def digest(self) -> str:
        """A text that changes with any number of the arrays, or with the facts."""
        parts = [part for name in sorted(self.arrays) for part in (name, self.arrays[name])]
        return digest(*parts, json.dumps(self.facts, sort_keys=True))

    def lines(self, name: str) -> "JsonLines":
        """Returns the values of `Writer.append_lines`."""
        return JsonLines(text=self.arrays[name + _BYTES], ends=self.arrays[name + _ENDS])

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Returns what a writer left in a folder. ValueError or OSError where that is not whole."""
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        arrays = {name: map_array(folder / name, dtype) for name, dtype in manifest["dtypes"].items()}
        store = cls(arrays=arrays, facts=manifest["facts"])
        if store.digest != manifest["digest"]:
            raise ValueError(f"{folder}: the files are not as {MANIFEST} says")
        return store


class Made(Sequence[T]):
    """Values that are made when they are asked for, each by its place from 0."""

    @abstractmethod
    def make(self, place: int) -> T:
        """Returns the value at a place that there is."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return self.make(places) if isinstance(places, int) else list(map(self.make, places))


@dataclass(frozen=True, kw_only=True, eq=False)
class JsonLines(Made[Any]):
    """Values, each read anew from its JSON when it is asked for."""

    text: np.ndarray  # uint8
    ends: np.ndarray  # int64 [N]
    numbers_ids: bool = False  # objects get their place as `id`

    def __len__(self) -> int:
        return len(self.ends)

    def make(self, place: int) -> Any:
        start = int(self.ends[place - 1]) if place else 0
        value = json.loads(self.text[start : int(self.ends[place])].tobytes().decode(errors="surrogatepass"))
        return {**value, "id": place} if self.numbers_ids else value
