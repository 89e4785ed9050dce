"""What devices a run asks for, and what this machine has, before JAX takes them."""

import os
import re
from typing import Any, Protocol

import jax

from realjax.launch.accelerators import count_accelerators
from realjax.launch.environment import ProcessGroup


class Machine(Protocol):
    """The options that say what a command runs on."""

    @property
    def n_nodes(self) -> int: ...
    @property
    def n_gpus_per_node(self) -> int | None: ...
    @property
    def accelerator_settings(self) -> str: ...
    @property
    def deterministic(self) -> bool: ...


def count_devices(config: Machine) -> int:
    """Returns the devices of a run whose machine is resolved."""
    assert config.n_gpus_per_node, "resolve_machine comes first"
    return config.n_nodes * config.n_gpus_per_node


def count_present(group: ProcessGroup | None) -> int:
    """Returns the accelerators of this machine; without any, the CPU devices that JAX is told to make, else one.

    Of several processes without an accelerator each has one.
    """
    per_node = 1 if group is None else group.processes_per_node
    if num_gpus := count_accelerators(os.environ, per_node):
        return num_gpus
    settings: Any = jax.config
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if group is not None:
        return per_node
    return max(1, settings.jax_num_cpu_devices, int(flag[1]) if flag else 1)
