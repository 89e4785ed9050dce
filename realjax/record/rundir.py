"""The directories of a run: its log file, and what an earlier run left, set aside so that nothing is overwritten."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from realjax.core.once import OnceFilter
from realjax.core.processes import is_first
from realjax.record.console import LIBRARIES, LOG_FORMAT, LOG_TIME_FORMAT

logger = logging.getLogger("realjax.rundir")
LOG_FILE = "run.log"


class LogFile(logging.FileHandler):
    """A log file. One that cannot be written is given up with a warning: what it would say is on the console too."""

    is_given_up = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_given_up:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        reason, self.is_given_up = sys.exc_info()[1], True
        with suppress(OSError):  # what is left to be written cannot be
            self.close()
        logger.warning("%s cannot be written (%s); the log goes on on the console", self.baseFilename, reason)


@contextmanager
def write_log(directory: Path) -> Iterator[None]:
    """While entered, the log also goes to `run.log` in the directory, and there alone what libraries say of errors.

    Each process has a file of its own.
    """
    name = LOG_FILE if is_first() else f"run.{jax.process_index()}.log"
    handler = LogFile(directory / name)
    handler.setFormatter(logging.Formatter(LOG_FORMAT, LOG_TIME_FORMAT))
    handler.addFilter(OnceFilter())
    loggers = [logging.getLogger(name) for name in ("realjax", *LIBRARIES)]
    for each in loggers:
        each.addHandler(handler)
    try:
        yield
    finally:
        for each in loggers:
            each.removeHandler(handler)
        handler.close()


def set_aside(directories: list[Path]) -> None:
    """Renames those that hold something to `<name>.<n>`, with the same n for all."""
    present = [d for d in directories if d.is_dir() and any(d.iterdir())]
    if not present:
        return
    n = next(n for n in range(1, 100_000) if not any(d.with_name(f"{d.name}.{n}").exists() for d in directories))
    for directory in present:
        directory.rename(directory.with_name(f"{directory.name}.{n}"))
        logger.info("kept the earlier run's %s as %s.%d", directory, directory.name, n)
