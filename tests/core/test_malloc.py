"""Freed memory is kept for the next program, whatever its size and thread, and given back when that is asked for."""

import ctypes
import platform
import subprocess
import sys

import pytest

HELPERS = """
import ctypes
from realjax.core.malloc import give_back_beyond, give_back_freed_memory, keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4 // 1024

def fill(mib):
    block = libc.malloc(mib * 2**20)
    assert block, "out of memory"
    ctypes.memset(block, 1, mib * 2**20)
    return block
"""

PROGRAM = (
    HELPERS
    + """
assert keep_freed_memory()
before = resident()
libc.free(fill(%d))
kept = resident() - before
assert give_back_freed_memory()
print(kept, resident() - before)
"""
)

# XLA takes the temporaries of a program that waits for its inputs in a thread of its own.
THREADS = (
    """
from realjax.apps.start import begin
begin()
import jax
jax.numpy.ones(8).block_until_ready()
"""
    + HELPERS
    + """
import threading

assert keep_freed_memory()
before = resident()
thread = threading.Thread(target=lambda: libc.free(fill(256)))
thread.start()
thread.join()
print(resident() - before)
"""
)

BOUNDS = (
    HELPERS
    + """
MIB = 2**20
assert keep_freed_memory() and give_back_freed_memory()
used = fill(256)  # what is in use counts for nothing
before = resident()
libc.free(fill(128))
give_back_beyond(192 * MIB)
kept = resident() - before
give_back_beyond(64 * MIB)
print(kept, resident() - before)
"""
)

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the functions are glibc's")


@needs_glibc
@pytest.mark.parametrize("mib", [64, 2304])  # of the second an int cannot say the bytes
def test_freed_memory_stays_until_it_is_given_back(mib: int) -> None:
    words = [sys.executable, "-c", PROGRAM % mib]
    kept, left = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    assert kept > 0.9 * mib
    assert left < 0.2 * mib


@needs_glibc
def test_a_command_s_threads_keep_freed_memory_too() -> None:
    words = [sys.executable, "-c", THREADS]
    kept = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert kept > 0.9 * 256


@needs_glibc
def test_freed_memory_is_given_back_beyond_a_bound() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("glibc is older than 2.33")
    words = [sys.executable, "-c", BOUNDS]
    kept, left = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    assert kept > 0.9 * 128
    assert left < 0.2 * 128
