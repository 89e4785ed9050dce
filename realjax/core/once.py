"""Lines of a log that say a fact of the whole run, and so are said once, however many programs they hold for."""

import logging

ONCE = {"once": True}  # as `extra` of a record


class OnceFilter(logging.Filter):
    """Lets a record with `ONCE` pass where its text was not seen before by this filter."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is to be shown."""
        if not getattr(record, "once", False):
            return True
        text = record.getMessage()
        is_new = text not in self._seen
        self._seen.add(text)
        return is_new
