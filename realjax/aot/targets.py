"""Machines to compile for that are not here: their devices, and what is known of them."""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

FOLDER = Path(__file__).parent / "targets"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Without a GPU XLA cannot try out which kernel is the fastest; with Triton's, large programs compile for minutes.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": "False", "xla_disable_hlo_passes": "triton-softmax-rewriter"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device, as a run would find it."""

    name: str
    title: str
    memory_bytes: int | None  # of a device; None where it is not known
    config: str | None = None  # XLA's text of a GPU (GpuTargetConfig); None: virtual CPU devices
    compile_options: Mapping[str, str] = field(default_factory=dict)

    def devices(self, num_hosts: int, per_host: int) -> Sequence[jax.Device]:
        """Returns the devices of so many hosts, numbered host by host. Programs can be compiled for them, not run.

        Raises ValueError where what compiles for them is not installed.
        """
        if self.config is None:
            return _virtual_devices(num_hosts * per_host)
        if not any(importlib.util.find_spec(name) for name in PLUGINS):
            raise ValueError(
                f"target {self.name}: found none of {', '.join(PLUGINS)}, which compile for GPUs; install realjax[aot] "
                "in an environment of its own (1.2 GB, no GPU and no driver needed), or use --target cpu"
            )
        topology = f"1x{num_hosts}x{per_host}"
        return topologies.get_topology_desc(platform="cuda", target_config=self.config, topology=topology).devices

    def compile(self, lowered: Lowered) -> Compiled:
        """Returns the compiled program; it cannot run, but for that of a CPU."""
        with without_compilation_cache():
            return lowered.compile(compiler_options=dict(self.compile_options) or None)


def find_target(name: str) -> Target:
    """Returns the target called `name`; ValueError naming those there are."""
    if name == "cpu":
        return Target(name="cpu", title="virtual CPU devices", memory_bytes=None)
    if name not in (known := list_targets()):
        raise ValueError(f"target: found '{name}'; there are {', '.join(known)}")
    config = (FOLDER / f"{name}.txtpb").read_text()
    return Target(
        name=name,
        title=_read(config, "name").strip('"'),
        memory_bytes=int(_read(config, "device_memory_size")),
        config=config,
        compile_options=GPU_OPTIONS,
    )


def list_targets() -> list[str]:
    """Returns the names of all targets."""
    return [*sorted(path.stem for path in FOLDER.glob("*.txtpb")), "cpu"]


def _read(config: str, field_name: str) -> str:
    found = re.search(rf"^\s*{field_name}: (.+)$", config, re.MULTILINE)
    if found is None:
        raise ValueError(f"target: its text has no {field_name}; add it, see {FOLDER / 'h100.txtpb'}")
    return found[1]


def _virtual_devices(needed: int) -> Sequence[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < needed:
        raise ValueError(
            f"target cpu: {needed} devices wanted, found {len(devices)}; set JAX_NUM_CPU_DEVICES={needed} before the "
            "first use of JAX"
        )
    return devices[:needed]


@contextmanager
def without_compilation_cache() -> Iterator[None]:
    """While entered, programs are compiled anew: JAX's cache can write those for other machines, and not read them."""
    settings: Any = jax.config
    was_enabled = settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_enabled)
        compilation_cache.reset_cache()
