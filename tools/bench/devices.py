"""The devices of a bench, prepared as a command of realjax prepares them."""

from dataclasses import dataclass

import jax

from realjax.apps.devices import prepare_environment
from realjax.core.malloc import keep_freed_memory, use_one_heap


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    n_gpus_per_node: int
    n_nodes: int = 1
    accelerator_settings: str = "recommended"
    deterministic: bool = False


def start_devices(num_devices: int = 1) -> list[jax.Device]:
    """Returns so many devices, virtual ones on a CPU; before JAX's backend has started."""
    use_one_heap()
    prepare_environment(_Wanted(n_gpus_per_node=num_devices), None)
    jax.config.update("jax_num_cpu_devices", num_devices)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    return jax.devices()[:num_devices]
