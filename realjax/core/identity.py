"""What a run is compared by when it continues: values and contents that decide about its result, and the others."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Values by the names that messages give them, all of them plain JSON."""

    fixed: Mapping[str, object]  # with another value it is another run
    contents: Mapping[str, str]  # as `fixed`, digests of data and models
    steering: Mapping[str, object]  # may change on the way, with effect from there on
    harmless: Mapping[str, object]  # may change without one


def digest(*parts: np.ndarray | bytes | str) -> str:
    """Returns a short text that changes with any of the arrays (of numbers), bytes and texts."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            head, body = f"{part.dtype}{part.shape}", np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        else:
            head, body = "", part.encode() if isinstance(part, str) else part
        # With their lengths in front: parts must not run into each other.
        total.update(f"{head}:{len(body)}:".encode())
        total.update(body)
    return total.hexdigest()
