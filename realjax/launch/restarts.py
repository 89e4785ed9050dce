"""Whether a run that ended is started again, as `recover_mode` and `recover_retries` of its command say."""

from collections.abc import Sequence

from realjax.core.exit_codes import FINAL

DEFAULT_RETRIES = 1  # of the option `recover_retries`
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 60.0


def find_word(words: Sequence[str], name: str) -> str | None:
    """Returns the value of the last `name=value` among a command's words, None without one."""
    values = [word.partition("=")[2] for word in words if word.partition("=")[0] == name]
    return values[-1] if values else None


def count_retries(words: Sequence[str]) -> int:
    """Returns how often a command that fails is to be started again: only one that then continues from its saves.

    Raises ValueError where `recover_retries` is no number.
    """
    if find_word(words, "recover_mode") != "auto":
        return 0
    text = find_word(words, "recover_retries") or str(DEFAULT_RETRIES)
    if not text.isdigit():
        raise ValueError(f"recover_retries: found {text!r}; it needs a number, 0 or more")
    return int(text)


def is_retried(code: int) -> bool:
    """Returns whether a run that ended with this code may go on when it is started again."""
    return code not in FINAL


def pause_seconds(attempt: int) -> float:
    """Returns how long to wait before the restart numbered from 1: what failed may need a while to be well again."""
    return min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
