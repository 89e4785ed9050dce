"""A run of several processes, the same program in each: joining, and agreeing on what only one of them knows."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

logger = logging.getLogger("realjax.processes")
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "REALJAX_COORDINATOR", "REALJAX_NUM_PROCESSES", "REALJAX_PROCESS_ID"


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes of a run and this one's place. `coordinator` None: JAX finds it in the cluster's environment."""

    coordinator: str | None
    num_processes: int
    process_id: int
    processes_per_node: int


def find_process_group(environ: Mapping[str, str]) -> ProcessGroup | None:
    """Returns the group that a launcher or Slurm describes in the environment, None for a run of one process.

    Raises ValueError when the description is incomplete or no number.
    """
    if COORDINATOR in environ:
        num_processes = _number(environ, NUM_PROCESSES)
        return ProcessGroup(
            coordinator=environ[COORDINATOR],
            num_processes=num_processes,
            process_id=_number(environ, PROCESS_ID),
            processes_per_node=_number(environ, "REALJAX_PROCESSES_PER_NODE", default=1),
        )
    if "SLURM_STEP_NODELIST" in environ and _number(environ, "SLURM_NTASKS", default=1) > 1:
        return ProcessGroup(
            coordinator=None,
            num_processes=_number(environ, "SLURM_NTASKS"),
            process_id=_number(environ, "SLURM_PROCID"),
            processes_per_node=max(1, _number(environ, "SLURM_NTASKS") // _number(environ, "SLURM_JOB_NUM_NODES")),
        )
    return None


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(
            f"{name}: found {text!r}; a run of several processes needs {COORDINATOR}=<host:port>, {NUM_PROCESSES} and "
            f"{PROCESS_ID} in every process's environment (python -m launch.local sets them)"
        )
    return int(text)


def join(group: ProcessGroup, devices_per_node: int) -> None:
    """Joins the group's processes; every one of them must call this before its first use of a device.

    On several devices a node each process takes its own share of them: JAX alone would give each process one.
    """
    share = max(1, devices_per_node // group.processes_per_node)
    first = group.process_id % group.processes_per_node * share
    jax.distributed.initialize(
        coordinator_address=group.coordinator,
        num_processes=group.num_processes,
        process_id=group.process_id,
        local_device_ids=list(range(first, first + share)) if "cuda" in _platforms() else None,
        initialization_timeout=120,
    )
    logger.info("process %d of %d joined", jax.process_index(), jax.process_count())


def _platforms() -> str:
    # Asking jax for its devices would start the backend too early; a GPU machine has this directory or variable.
    has_gpu = os.path.exists("/proc/driver/nvidia") or "CUDA_VISIBLE_DEVICES" in os.environ
    return "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" or not has_gpu else "cuda"


def is_first() -> bool:
    """Returns whether this process writes what a run writes once."""
    return jax.process_index() == 0


def from_first(value: float) -> float:
    """Returns the first process's value in every process. Every process must call this."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float64(value)))


def text_from_first(text: str, size: int = 256) -> str:
    """Returns the first process's text (at most `size` bytes) in every process. Every process must call this."""
    if jax.process_count() == 1:
        return text
    padded = np.frombuffer(text.encode().ljust(size, b"\0"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b"\0").decode()


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in some process. Every process must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
