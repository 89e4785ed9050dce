"""Where the log of a command goes."""

import logging

from rich.console import Console

from realjax.record.console import LOG_FORMAT, LOG_TIME_FORMAT, ConsoleHandler, make_console


def configure_logging() -> Console:
    """Sends realjax's log to the console, in place of what an earlier call set up, and returns that console."""
    root = logging.getLogger("realjax")
    for handler in [h for h in root.handlers if isinstance(h, ConsoleHandler)]:
        root.removeHandler(handler)
    console = make_console()
    handler = ConsoleHandler(console)
    handler.setFormatter(ShortNameFormatter(LOG_FORMAT, LOG_TIME_FORMAT))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    # Libraries give the root logger handlers of their own, which would print every line again.
    root.propagate = False
    return console


class ShortNameFormatter(logging.Formatter):
    """Shows the logger `realjax.quickstart` as `quickstart`."""

    def format(self, record: logging.LogRecord) -> str:
        short = logging.makeLogRecord(record.__dict__ | {"name": record.name.removeprefix("realjax.")})
        return super().format(short)
