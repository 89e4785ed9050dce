"""GPUs that programs are compiled for where there is none: their devices, and compiling for them."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

# An H100 SXM, as NVIDIA's data sheet and the CUDA guide's table of compute capability 9.0 have it.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# Without a GPU nothing is tried out, and with Triton's kernels large programs compile for minutes.
OPTIONS = {"xla_gpu_enable_triton_gemm": "False", "xla_disable_hlo_passes": "triton-softmax-rewriter"}


def skip_without_gpu_compiler() -> None:
    """Skips the test where the wheels of the extra `aot` are not installed. Done for each test marked `aot`."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("compiling for GPUs needs the wheels of the extra `aot`: make aot")


def h100s(num_gpus: int = 8, num_hosts: int = 1) -> list[jax.Device]:
    """Returns the devices of hosts with `num_gpus` H100s each, to lower programs for."""
    topology = f"1x{num_hosts}x{num_gpus}"
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology=topology).devices


def compile_for_gpus(lowered: Lowered, **options: str) -> Compiled:
    """Returns the program of what was lowered for `h100s`, whose text and memory can be read but which cannot run."""
    with without_compilation_cache():  # it could be written there and not be read again
        return lowered.compile(compiler_options=OPTIONS | options)


@contextmanager
def without_compilation_cache() -> Iterator[None]:
    """While entered, programs are compiled anew."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
