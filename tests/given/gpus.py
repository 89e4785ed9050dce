"""GPUs that programs are compiled for where there is none: their devices, and compiling for them."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import jax
import pytest
from jax.stages import Compiled, Lowered

from realjax.aot.targets import PLUGINS, find_target


def skip_without_gpu_compiler() -> None:
    """Skips the test where the wheels of the extra `aot` are not installed. Done for each test marked `aot`."""
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        pytest.skip("compiling for GPUs needs the wheels of the extra `aot`: make aot")


def h100s(num_gpus: int = 8, num_hosts: int = 1) -> Sequence[jax.Device]:
    """Returns the devices of hosts with `num_gpus` H100s each, to lower programs for."""
    return find_target("h100").devices(num_hosts, num_gpus)


def compile_for_gpus(lowered: Lowered, **options: str) -> Compiled:
    """Returns the program of what was lowered for `h100s`, whose text and memory can be read but which cannot run."""
    target = find_target("h100")
    return replace(target, compile_options={**target.compile_options, **options}).compile(lowered)
