"""The devices of a command, as JAX gives them to it and to the processes that it is one of."""

import logging
import os
from pathlib import Path
from typing import Any

import jax

from realjax.apps.present import Machine, count_devices
from realjax.core.malloc import keep_freed_memory
from realjax.core.processes import count_cores, is_first
from realjax.launch.accelerators import find_accelerator, find_cores
from realjax.launch.environment import ProcessGroup, join
from realjax.launch.settings import choose_environment

logger = logging.getLogger("realjax.quickstart")

MOST_DEVICES = 1024


def prepare_environment(config: Machine, group: ProcessGroup | None) -> tuple[str, ...]:
    """Sets what XLA, CUDA and NCCL read as they start, and returns what to log of it; ValueError if it cannot be."""
    num_devices = count_devices(config)
    environment = choose_environment(
        os.environ,
        find_accelerator(os.environ) or find_cores(num_devices // config.n_nodes, count_cores()),
        num_devices // (1 if group is None else group.num_processes),
        recommend=config.accelerator_settings == "recommended",
        deterministic=config.deterministic,
    )
    # That PyTorch is not there is as it should be: of transformers only configurations and tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.update(environment.variables)
    return environment.notices


def join_group(config: Machine, group: ProcessGroup) -> None:
    """Joins the processes of a command; only the first one logs its progress.

    ValueError when the devices do not divide over the processes.
    """
    needed = count_devices(config)
    if needed % group.num_processes:
        raise ValueError(
            f"n_nodes*n_gpus_per_node: {needed} devices do not divide over {group.num_processes} processes; "
            "start as many processes as divide them"
        )
    check_num_devices(needed // group.num_processes)
    jax.config.update("jax_num_cpu_devices", needed // group.num_processes)
    join(group, needed // config.n_nodes)
    if not is_first():
        logging.getLogger("realjax").setLevel(logging.WARNING)


def check_num_devices(num_devices: int) -> None:
    """Raises ValueError for more devices than one process can have, virtual ones included."""
    if num_devices > MOST_DEVICES:
        raise ValueError(
            f"n_nodes*n_gpus_per_node: found {num_devices} devices for one process, which has at most {MOST_DEVICES}; "
            "lower them, or start more processes (docs/processes.md)"
        )


def prepare_devices(n_nodes: int, n_gpus_per_node: int, cache: Path) -> tuple[jax.Device, ...]:
    """Returns the first n_nodes*n_gpus_per_node devices, virtual ones where there is no accelerator.

    ValueError when there are accelerators, but too few. Programs compiled earlier come from `cache`.
    """
    needed = n_nodes * n_gpus_per_node
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # Small programs too: a run has many, and their compiling takes longer than to read them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if settings.jax_num_cpu_devices < needed and not jax.distributed.is_initialized():
        check_num_devices(needed)
        # Only possible before the first use of a device.
        jax.config.update("jax_num_cpu_devices", needed)
    devices, platform = jax.devices(), jax.default_backend()
    if len(devices) < needed:
        raise ValueError(
            f"n_nodes*n_gpus_per_node: {n_nodes}*{n_gpus_per_node} = {needed} devices wanted, but this machine has "
            f"{len(devices)} ({platform}); set n_nodes, n_gpus_per_node and the parallel sizes to what there is, or "
            "set JAX_PLATFORMS=cpu to use virtual CPU devices"
        )
    if platform == "cpu":
        stand_in = "one CPU device stands" if needed == 1 else f"{needed} virtual CPU devices stand"
        logger.info("No accelerator found: %s in.", stand_in)
        keep_freed_memory()
    return tuple(devices[:needed])
