"""Checksums of a directory's files: what shows, before anything is read, that a save is whole and as it was written."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from realjax.core.json_text import JsonObject

MANIFEST = "manifest.json"
DIGEST_BYTES = 16
MOST_THREADS = 16


def write_manifest(directory: Path, *, left_out: str | None = None) -> None:
    """Writes the size and the checksum of every file in the directory but one of that name, after all of them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != left_out)
    names = [str(path.relative_to(directory)) for path in files]
    described = dict(zip(names, _describe(directory, names), strict=True))
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"files": described}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(directory: Path, *, share: int = 0, num_shares: int = 1) -> str | None:
    """Returns what is wrong with the directory, None when it is as its manifest says.

    Of several readers each may look at every `num_shares`-th file only.
    """
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = dict(list(files.items())[share::num_shares])
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never completed, or made before saves had one"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} is damaged"
    if absent := [name for name in expected if not (directory / name).is_file()]:
        return f"'{absent[0]}' is missing"
    found = _describe(directory, list(expected))
    changed = [name for name, is_now in zip(expected, found, strict=True) if is_now != expected[name]]
    return f"'{changed[0]}' is not as it was written" if changed else None


def _describe(directory: Path, names: Sequence[str]) -> list[JsonObject]:
    def one(name: str) -> JsonObject:
        path = directory / name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES))  # type: ignore[arg-type]
        return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}

    # Hashing lets other threads run, and so do reads of a slow disk.
    with ThreadPoolExecutor(MOST_THREADS) as threads:
        return list(threads.map(one, names))
