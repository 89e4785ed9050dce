"""The directories of a run: made, continued, or set aside so that nothing in them is overwritten."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from realjax.dataflow.run import RunSpec
from realjax.runtime.checkpoint import clear_after, drop_oldest
from realjax.runtime.console import LIBRARIES, LOG_FORMAT, LOG_TIME_FORMAT
from realjax.runtime.metrics import replace_text
from realjax.runtime.processes import from_first, is_first
from realjax.runtime.report import REPORT_FILE

logger = logging.getLogger("realjax.rundir")
LOG_FILE = "run.log"


def open_run_directory(spec: RunSpec, *, continues_after: int | None) -> None:
    """Prepares the run's directories: those of a run that continues after a step, or empty ones.

    A run that starts anew sets what an earlier run of the same names left aside, under `<trial>.<n>`.
    """
    paths = spec.paths
    if is_first():
        if continues_after is None:
            set_aside([paths.recover, paths.checkpoints, paths.logs])
        for path in (paths.logs, paths.checkpoints, paths.recover):
            path.mkdir(parents=True, exist_ok=True)
        if continues_after is not None:
            clear_after(paths.recover, continues_after)
            drop_oldest(paths.recover, spec.max_recover_saves)
            # Its presence says that a run is finished.
            (paths.logs / REPORT_FILE).unlink(missing_ok=True)
        replace_text(paths.logs / "config.json", spec.config_json)
    from_first(0)  # the directories are there before another process looks


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
