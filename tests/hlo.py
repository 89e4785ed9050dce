"""What a program reduces between devices, read from XLA's own text after partitioning.

Before the backend's passes, that is: a CPU's would widen 16-bit reductions, where an accelerator's would not.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from realjax.aot.hlo import read_groups
from realjax.aot.targets import without_compilation_cache

_REDUCTION = re.compile(
    r"= \(?(\w+)\[([\d,]*)\].*? (all-reduce|reduce-scatter)(?:-start)?\(.*replica_groups=(.*?), use_"
)


@dataclass(frozen=True)
class Reduction:
    """One all-reduce or reduce-scatter: its type, its shape on a device, and the devices that sum with each other."""

    dtype: str
    shape: tuple[int, ...]
    groups: np.ndarray  # [G, S]


def reductions(fn: Callable[..., Any], *args: Any) -> list[Reduction]:
    """Returns the reductions between devices in the program of `fn(*args)`."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        options |= {"xla_backend_optimization_level": 0, "xla_dump_disable_metadata": True}
        with without_compilation_cache():
            jax.jit(fn).lower(*args).compile(compiler_options=options)
        (path,) = Path(folder).glob("*after_spmd-partitioning*.txt")
        return list(_read(path.read_text()))


def _read(text: str) -> Iterator[Reduction]:
    for dtype, shape, _, groups in _REDUCTION.findall(text):
        yield Reduction(dtype, tuple(map(int, filter(None, shape.split(",")))), read_groups(groups, jax.device_count()))
