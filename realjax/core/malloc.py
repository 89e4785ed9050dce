"""How the C allocator treats the buffers of CPU programs."""

import ctypes
import os
import sys
from typing import Any

# Parameter numbers of glibc's mallopt, see `man 3 mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_elsewhere = 0  # bytes of `_outside` when freed memory was last given back: the heap is the process's, and so is this


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
    MB took five times as long. Only in a process of one heap; what is kept is bounded by `give_back_beyond` alone.
    """
    mallopt = _find("mallopt")
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def give_back_freed_memory() -> bool:
    """Gives all freed memory back to the kernel, once; returns False where there is no glibc.

    For a program's start: what loading and compiling have left in pieces fits none of its blocks.
    """
    global _elsewhere
    trim = _find("malloc_trim")
    if trim is not None:
        trim(0)
        _elsewhere = _outside()
    return trim is not None


def give_back_beyond(most: int) -> None:
    """Gives freed memory back where more than `most` bytes of it are kept since it was last given back.

    Does nothing in a process that never gave any back, or where glibc is older than 2.33 and says no sizes.
    """
    if _elsewhere and _outside() - _elsewhere > most:
        give_back_freed_memory()


class _Mallinfo(ctypes.Structure):
    """What `mallinfo2` returns, see `man 3 mallinfo`."""

    _fields_ = [(f"before_{i}", ctypes.c_size_t) for i in range(7)] + [
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def _outside() -> int:
    """Returns the bytes that are resident but in no block in use: what was freed and kept, and all but the heap."""
    mallinfo = _find("mallinfo2")
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") - mallinfo().uordblks


def _find(name: str) -> Any:
    """Returns a function of glibc, None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
