"""How the C allocator treats the buffers of CPU programs."""

import ctypes
import sys
from collections.abc import Callable

# Parameter numbers of glibc's mallopt, see `man 3 mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def use_one_heap() -> bool:
    """Tells glibc to give threads no heaps of their own; returns False where there is no glibc.

    Such a heap is small, so a large block of its thread is mapped from the kernel, whatever is set. glibc listens
    only until a first thread has asked for memory: to be called before imports, of which some start threads.
    """
    mallopt = _find("mallopt")
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, 1))


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next program; returns False where there is no glibc.

    XLA's CPU backend takes every temporary of a step anew. By default glibc maps such large blocks from the kernel and
    gives them back each time, and the page faults cost more than many of the operations: an elementwise pass over 60
    MB took five times as long. The process then keeps its largest size until it ends. Only in a process of one heap.
    """
    mallopt = _find("mallopt")
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def give_back_freed_memory() -> bool:
    """Gives all freed memory back to the kernel, once; returns False where there is no glibc.

    For a program's start: what loading and compiling have left in pieces fits none of its blocks.
    """
    trim = _find("malloc_trim")
    if trim is not None:
        trim(0)
    return trim is not None


def _find(name: str) -> Callable[..., int] | None:
    """Returns a function of glibc, where there is one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
