"""What a command's process does before its imports, which take seconds."""

import gc
import os
import signal

from realjax.core.malloc import use_one_heap
from realjax.launch.accelerators import find_accelerator


def begin() -> None:
    """Prepares the process for its imports."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C meanwhile has nothing to tell
    # Imports and tracing make objects by the hundred thousand, and hardly any garbage: looked through as often as
    # Python would by itself, they take half a second of a start.
    gc.set_threshold(50_000, 20, 50)
    if find_accelerator(os.environ) is None:  # what a CPU's programs free is kept for the next one
        use_one_heap()
