"""What a command's process does before its imports, which take seconds."""

import gc
import signal


def begin() -> None:
    """Prepares the process for its imports."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C meanwhile has nothing to tell
    # Imports and tracing make objects by the hundred thousand, and hardly any garbage: looked through as often as
    # Python would by itself, they take half a second of a start.
    gc.set_threshold(50_000, 20, 50)
