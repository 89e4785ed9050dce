"""One run of a name at a time: a lock that says who holds it, and that a dead holder leaves behind without harm."""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from realjax.core.processes import from_first, is_first

logger = logging.getLogger("realjax.lock")


@contextmanager
def lock_run(logs: Path) -> Iterator[None]:
    """While entered, no other run has the names of this one; taken by the first process of a run.

    The lock is the kernel's, on a file beside the log directory, which itself may be moved: it goes with its process,
    however that ends. Raises ValueError, naming the holder, when another run has it.
    """
    if not is_first():
        from_first(0)  # the first process has it, or has ended the run
        yield
        return
    path = logs.with_name(f".{logs.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _take(path, logs) as file:
        try:
            started = datetime.now().isoformat(" ", "seconds")
            file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}))
            file.flush()
            from_first(0)
            yield
        finally:
            path.unlink(missing_ok=True)  # a run that was refused leaves nothing


def _take(path: Path, logs: Path) -> TextIO:
    """Returns the file, locked and empty. ValueError where another run has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            with file:
                holder = _describe_holder(file.read())
            raise ValueError(
                f"trial_name: another run of this name is going on ({holder}), and both would write to {logs}; wait "
                "for it, end it, or use another trial_name"
            ) from error
        except OSError as error:
            logger.warning("fileroot's disk has no locks (%s): a second run of this name would go unnoticed", error)
        # Its holder may have removed it between the two: then a third run could make and lock another one.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                return file
        file.close()


def _describe_holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "its holder has just taken it"
