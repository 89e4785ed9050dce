"""Kills of a run in this process: before any of the effects that it has on files, everything stops."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# What makes, moves and removes files; an opened file counts as made.
EFFECTS = ("replace", "rename", "unlink", "rmdir", "mkdir")


class Killed(BaseException):
    """No `except` of the run is to catch it."""


class Watch:
    """Counts the effects on files beneath a directory, and lets none happen from the one numbered `last` on."""

    def __init__(self, root: Path, last: int | None = None) -> None:
        self.root, self.last = str(root), last
        self.seen: list[str] = []

    def before(self, name: str, path: Any) -> None:
        """Notes one effect, or raises Killed: also in what would clean up after the first one."""
        if not str(path).startswith(self.root):
            return
        if self.last is not None and len(self.seen) >= self.last:
            raise Killed
        self.seen.append(f"{name} {path}")

    def wrap(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, watched."""

        def watched(path: Any, *args: Any, **options: Any) -> Any:
            mode = str(options.get("mode", args[0] if args else "r"))
            if name != "open" or any(letter in mode for letter in "wax+"):
                self.before(name, path)
            return fn(path, *args, **options)

        return watched


@contextmanager
def watching(root: Path, last: int | None = None) -> Iterator[Watch]:
    """While entered, effects on files beneath `root` are counted, and stop with the one numbered `last`."""
    watch = Watch(root, last)
    with pytest.MonkeyPatch.context() as patch:
        for name in EFFECTS:
            patch.setattr(os, name, watch.wrap(name, getattr(os, name)))
        patch.setattr(shutil, "rmtree", watch.wrap("rmtree", shutil.rmtree))
        patch.setattr(io, "open", watch.wrap("open", io.open))
        yield watch
