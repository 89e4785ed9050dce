"""Names of paths for a person: without what all of them share."""

from collections.abc import Sequence
from pathlib import Path


def shorten_paths(paths: Sequence[Path]) -> list[str]:
    """Returns the paths without what all of them begin with, a directory at a time."""
    parts = [path.parts for path in paths]
    shared = 0
    while all(len(each) > shared + 1 for each in parts) and len({each[shared] for each in parts}) == 1:
        shared += 1
    return [str(Path(*each[shared:])) for each in parts]
