"""What the machine does to a run, told in a line: a disk that is full, read-only or gone."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Libraries that write on threads of their own raise other errors, with the system's in their text.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)
DISK_TEXTS = "|".join(re.escape(os.strerror(number)) for number in DISK_ERRORS)
SYSTEM_TEXT = re.compile(rf"OS error (\d+)|os_error_code='(\d+)'|{DISK_TEXTS}")
MEMORY_TEXT = re.compile(r"out of memory[^\n.;]*|RESOURCE_EXHAUSTED[^\n.;]*(?:alloc|memory)[^\n.;]*", re.IGNORECASE)
MORE_ROOM = (
    "take more and smaller micro-batches (n_mbs of the call, as allocation.n_mbs or actor_train.n_mbs), "
    "gradient_checkpointing=True of the model, shorter or fewer sequences, or more devices"
)
QUOTED = re.compile(r"""["'](/[^"']+)["']""")


class RunFault(RuntimeError):
    """A run cannot go on, and nothing is wrong with its code: the message says why, what is safe, and how to go on."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """While entered, an OSError that names no file, as those of a full disk, gets this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def removed(path: str | Path) -> FileNotFoundError:
    """Returns the error of a file or directory that a run relies on, and that somebody has removed."""
    return FileNotFoundError(errno.ENOENT, "was removed while the run went on", str(path))


@contextmanager
def explain_faults(describe_rest: Callable[[], str]) -> Iterator[None]:
    """While entered, an error that comes from the operating system, or from a device without room, becomes a RunFault,
    with what else there is to say.

    Other errors pass, also those that a user caused.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RunFault) or (reason := system_reason(error) or memory_reason(error)) is None:
            raise
        raise RunFault(f"{reason}; {describe_rest()}") from error


def memory_reason(error: BaseException) -> str | None:
    """Returns that a device had no room for a program, and what takes less; None for other errors."""
    if not isinstance(error, RuntimeError) or (found := MEMORY_TEXT.search(str(error))) is None:
        return None
    return f"a device has no room for what the run computes ({found[0].strip()}); {MORE_ROOM}"


def system_reason(error: BaseException) -> str | None:
    """Returns what the operating system refused, and at which file, where that is behind the error; None elsewhere."""
    if isinstance(error, ValueError) and isinstance(error.__cause__, OSError):
        return None  # said in words already, with a remedy
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    if isinstance(error, ValueError):  # a user's, such as of a file that is missing, unless the disk is behind it
        chain = [link for link in chain if not isinstance(link, OSError) or link.errno in DISK_ERRORS]
    # The first of them: the others happened on its way out. One without a file says less.
    reasons = [reason for link in reversed(chain) if (reason := _reason(link)) is not None]
    named = [f"{file}: {text}" for file, text in reasons if file]
    return next(iter([*named, *(text for _, text in reasons)]), None)


def _reason(error: BaseException) -> tuple[str | None, str] | None:
    if isinstance(error, OSError) and error.strerror:
        file = error.filename2 or error.filename  # of a copy: where to
        return file and str(file), error.strerror
    text = str(error)
    if not isinstance(error, ValueError | RuntimeError) or (found := SYSTEM_TEXT.search(text)) is None:
        return None
    number, file = found[1] or found[2], QUOTED.search(text)
    return file and file[1], os.strerror(int(number)) if number else found[0]
