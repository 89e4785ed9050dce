"""Console lines of a run: one line per step, and a progress bar under them when the output is a terminal."""

import logging
import math
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from realjax.core.once import OnceFilter

logger = logging.getLogger("realjax.loop")
LOG_FORMAT = "%(asctime)s.%(msecs)03d %(name)s %(levelname)s: %(message)s"
LOG_TIME_FORMAT = "%Y%m%d-%H:%M:%S"
# Loggers of libraries that report errors of their threads. Whoever waits for these is told too, so the console is not.
LIBRARIES = ("asyncio", "absl")
# The first steps compile and warm caches, so they say nothing about the steps to come.
NUM_UNTIMED_STEPS = 2
TERMINAL_TIME_FORMAT = "%H:%M:%S"
MOST_COLUMNS = 100  # of a line on a terminal, where a path is not longer than that
VALUE_FORMATS = {
    "loss": ".4f",
    "ppl": ",.2f",
    "lr": ".1e",
    "grad_norm": ".3f",
    "seconds": ",.2f",
    "tokens_per_second": ",.0f",
    "n_tokens": ",.0f",
    "n_seqs": ",.0f",
    "avg_response_len": ",.1f",
}
# What a number counts, where its name does not say it. All tokens are those of prompts and answers, without padding.
PHRASES = {
    "seconds": "{} s",
    "tokens_per_second": "{} tokens/s (all)",
    "n_tokens": "{} tokens in the loss",
    "n_seqs": "{} sequences",
    "avg_response_len": "{} tokens an answer",
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While entered, errors on libraries' threads go to the log of a run alone, not to the console."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    kept, nothing, hook = [each.propagate for each in loggers], logging.NullHandler(), sys.unraisablehook

    def log_stray(stray: "sys.UnraisableHookArgs") -> None:
        # TensorStore's threads tell an event loop of Orbax's, closed by the first error, that they failed as well.
        if threading.current_thread() is threading.main_thread() or stray.exc_value is None:
            hook(stray)
        else:
            loggers[0].error("on a thread", exc_info=(stray.exc_type, stray.exc_value, stray.exc_traceback))

    for each in loggers:
        each.propagate = False
        each.addHandler(nothing)
    sys.unraisablehook = log_stray
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for each, propagate in zip(loggers, kept, strict=True):
            each.propagate = propagate
            each.removeHandler(nothing)


@dataclass(frozen=True, kw_only=True)
class StepLine:
    """One finished step: counters start at 1, `seconds` is its wall time, `metrics` keep their order in the line."""

    epoch: int
    num_epochs: int
    epoch_step: int
    steps_per_epoch: int
    global_step: int
    seconds: float
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)

    def text(self, eta_seconds: float | None = None) -> str:
        """`Epoch 1/8 step 3/16 (global step 3): loss 2.3456, ..., 0.83 s, ETA 0:01:40`."""
        text = label_values({**self.metrics, "seconds": self.seconds})
        rest = "" if eta_seconds is None else f", ETA {format_seconds(eta_seconds)}"
        return (
            f"Epoch {self.epoch}/{self.num_epochs} step {self.epoch_step}/{self.steps_per_epoch} "
            f"(global step {self.global_step}): {text}{rest}"
        )


class LogConsole(Console):
    """A console whose loss is an error like others; rich would end the process without a word."""

    def on_broken_pipe(self) -> None:
        raise


class ConsoleHandler(logging.Handler):
    """Prints log records on a rich console; on the console of a `ProgressDisplay` they appear above its bar.

    A terminal gets the time of day and the text, folded at words; what is no terminal gets each record as one line.
    A console that is gone, such as a pipe that nobody reads, ends no run: it is given up with a warning.
    """

    is_given_up = False

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(logging.Formatter(LOG_FORMAT, LOG_TIME_FORMAT))
        self.addFilter(OnceFilter())

    def emit(self, record: logging.LogRecord) -> None:
        if self.is_given_up:
            return
        try:
            text = fold_record(record, self.console.width) if self.console.is_terminal else self.format(record)
            # Log text is data, not rich markup; what is longer than the line, such as a path, stays in one piece.
            self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        except OSError as error:
            self.is_given_up = True
            logger.warning("the console cannot be written (%s); the log goes on in the run's directory", error)


class ProgressDisplay:
    """Logs a line per step, and shows a bar below the log when `console` is a terminal.

    The lines go wherever the log goes; a `ConsoleHandler` on the same console prints them above the bar.
    `done_steps` of `total_steps` were done by an earlier process of the run. Use as a context manager: leaving it, also
    by an exception, gives the terminal back.
    """

    def __init__(self, total_steps: int, console: Console | None = None, done_steps: int = 0) -> None:
        self.console = make_console() if console is None else console
        self._steps_left = total_steps - done_steps
        self._num_timed = -NUM_UNTIMED_STEPS
        self._timed_seconds = 0.0
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_interactive,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=done_steps)

    def finish_step(self, line: StepLine) -> None:
        """Logs the line of a finished step with the time left, and moves the bar."""
        self._steps_left -= 1
        self._num_timed += 1
        if self._num_timed > 0:
            self._timed_seconds += line.seconds
        eta_seconds = self.eta_seconds()
        logger.info(line.text(eta_seconds))
        eta = "" if eta_seconds is None else f"ETA {format_seconds(eta_seconds)}"
        self._progress.update(self._task, advance=1, description=eta)

    def eta_seconds(self) -> float | None:
        """Mean step time without this process's first two steps, times the steps left; None before the third."""
        if self._num_timed <= 0:
            return None
        return self._timed_seconds / self._num_timed * max(self._steps_left, 0)

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def make_console(file: TextIO | None = None) -> Console:
    """A console on `file` (stdout) that writes control characters to a terminal only, whatever FORCE_COLOR says."""
    stream = sys.stdout if file is None else file
    return LogConsole(file=stream, force_terminal=stream.isatty())


def fold_record(record: logging.LogRecord, width: int) -> str:
    """Returns a record as a person reads it on a terminal: the time of day, and lines of at most `MOST_COLUMNS`."""
    time = logging.Formatter().formatTime(record, TERMINAL_TIME_FORMAT)
    level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
    indent, columns = " " * (len(time) + 1), min(width, MOST_COLUMNS)
    folded = []
    for line in (level + record.getMessage()).splitlines():
        own = " " * (len(line) - len(line.lstrip()))  # a table's, or a list's
        folded += textwrap.wrap(
            line, columns, initial_indent=indent, subsequent_indent=f"{indent}{own}  ",
            break_long_words=False, break_on_hyphens=False,
        ) or [""]  # fmt: skip
    if record.exc_info:
        folded.append(logging.Formatter().formatException(record.exc_info))
    return time + "\n".join(folded)[len(time) :]


def label_value(name: str, value: float | int | str) -> str:
    """`loss 2.3456`, or `12,345 tokens/s (all)` for a number that its name does not explain."""
    text = format_value(name, value)
    group, _, last_part = name.rpartition("/")
    if last_part not in PHRASES:
        return f"{name} {text}"
    phrase = PHRASES[last_part].format(text)
    return f"{group}: {phrase}" if group else phrase


def label_values(values: Mapping[str, float | int | str]) -> str:
    """Returns several, with commas between."""
    return ", ".join(label_value(name, value) for name, value in values.items())


def format_value(name: str, value: float | int | str) -> str:
    """A metric's value as a person reads it; the last part of `name` (`actor/loss`) picks the number of decimals."""
    if isinstance(value, str):
        return value
    style = VALUE_FORMATS.get(name.rsplit("/", 1)[-1])
    if isinstance(value, int) and style is None:
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    # A fixed number of decimals would print a small value as zero and a huge one as a row of digits.
    if style is None or not (value == 0 or 0.1 <= abs(value) < 1e7):
        style = ".1e" if style == ".1e" else ".4g"
    return format(value, style)


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds as `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
