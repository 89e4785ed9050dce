"""How the C allocator treats the buffers of CPU programs."""

import ctypes
import sys

# Parameter numbers of glibc's mallopt, see `man 3 mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next program; returns False where there is no glibc.

    XLA's CPU backend takes every temporary of a step anew. By default glibc maps such large blocks from the kernel and
    gives them back each time, and the page faults cost more than many of the operations: an elementwise pass over 60
    MB took five times as long. The process then keeps its largest size until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_ARENA_MAX, 1)])
