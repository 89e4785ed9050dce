"""A run of several processes, the same program in each: how one finds the others, joins them, and ends."""

import importlib
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import jax

from realjax.launch.accelerators import find_accelerator

logger = logging.getLogger("realjax.launch")
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "REALJAX_COORDINATOR", "REALJAX_NUM_PROCESSES", "REALJAX_PROCESS_ID"
PROCESSES_PER_NODE = "REALJAX_PROCESSES_PER_NODE"
# The launcher's pipe, which closes when the launcher ends.
LIFELINE = "REALJAX_LIFELINE"
# A process that has said nothing for so long is taken for lost, a stopped one too.
HEARTBEAT_SECONDS = 40
# What Kubernetes tells the pods of an Indexed Job. Who belongs to it is asked by JAX, whose module has no public name.
KUBERNETES_HOST, KUBERNETES_INDEX = "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"
KUBERNETES_CLUSTER = "jax._src.clusters.k8s_cluster"
JOIN_SECONDS = 600  # until all are there: their imports take seconds, or minutes on a busy machine
# In errors of a process whose peers are gone, after the status with which XLA begins its own.
LOST = re.compile(
    r"[A-Z_]+: .*(?:Gloo|NCCL|[Cc]onnection (?:closed|reset|refused)|Socket closed|heartbeat|coordination service)"
)


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes of a run and this one's place. `coordinator` None: JAX finds it in the cluster's environment."""

    coordinator: str | None
    num_processes: int
    process_id: int
    processes_per_node: int
    local_id: int  # among those of its node

    def __post_init__(self) -> None:
        if self.process_id >= self.num_processes or self.processes_per_node < 1:
            raise ValueError(
                f"processes: process {self.process_id} of {self.num_processes}, {self.processes_per_node} a node; "
                "numbers start at 0 and end before the number of processes, and a node has at least one"
            )

    def local_device_ids(self, devices_per_node: int, num_visible: int | None = None) -> list[int]:
        """Returns the numbers of this process's devices among the `num_visible` that it sees (None: all of its node).

        Each process takes its own share of the node. JAX alone would give each process one.
        """
        share = max(1, devices_per_node // self.processes_per_node)
        # A cluster may show each process its share only.
        first = 0 if num_visible == share else self.local_id * share
        return list(range(first, first + share))


def find_process_group(environ: Mapping[str, str]) -> ProcessGroup | None:
    """Returns the group that a launcher, Slurm or Kubernetes describes, None for a run of one process.

    Raises ValueError when the description is incomplete or no number.
    """
    if COORDINATOR in environ:
        process_id, per_node = _number(environ, PROCESS_ID), _number(environ, PROCESSES_PER_NODE, default=1)
        return ProcessGroup(
            coordinator=environ[COORDINATOR],
            num_processes=_number(environ, NUM_PROCESSES),
            process_id=process_id,
            processes_per_node=per_node,
            local_id=process_id % max(1, per_node),
        )
    if "SLURM_STEP_NODELIST" in environ and _number(environ, "SLURM_NTASKS", default=1) > 1:
        num_processes, num_nodes = _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_STEP_NUM_NODES")
        return ProcessGroup(
            coordinator=None,
            num_processes=num_processes,
            process_id=_number(environ, "SLURM_PROCID"),
            processes_per_node=num_processes // max(1, num_nodes),
            # Tasks may be dealt out over the nodes in turn.
            local_id=_number(environ, "SLURM_LOCALID"),
        )
    if KUBERNETES_HOST in environ and KUBERNETES_INDEX in environ and importlib.util.find_spec("kubernetes"):
        return _ask_kubernetes()
    return None


def _ask_kubernetes() -> ProcessGroup | None:
    """Returns the group of this pod's Indexed Job or JobSet, a process for each pod, as JAX finds it."""
    cluster = importlib.import_module(KUBERNETES_CLUSTER).K8sCluster
    try:
        if not cluster.is_env_present() or (num_processes := cluster.get_process_count()) == 1:
            return None
        # The address is looked up again as they join; what is wrong with the job is told here.
        cluster.get_coordinator_address(timeout_secs=None, override_coordinator_port=None)
        process_id = cluster.get_process_id()
    except RuntimeError as error:
        raise ValueError(
            f"kubernetes: the other pods of this one's job are not found ({error}); mend the job, or set "
            f"{COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID} in its pods, as realjax launch k8s does"
        ) from error
    return ProcessGroup(
        coordinator=None, num_processes=num_processes, process_id=process_id, processes_per_node=1, local_id=0
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(
            f"{name}: found {text!r}; a run of several processes needs {COORDINATOR}=<host:port>, {NUM_PROCESSES} and "
            f"{PROCESS_ID} in every process's environment (python -m launch.local sets them)"
        )
    return int(text)


def join(group: ProcessGroup, devices_per_node: int) -> None:
    """Joins the group's processes; every one of them must call this before its first use of a device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_visible = None if visible is None else len(visible.split(","))
    has_gpu = find_accelerator(os.environ) is not None
    # It would take SIGTERM for itself, and a run could not be stopped before its first step.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=group.coordinator,
        num_processes=group.num_processes,
        process_id=group.process_id,
        local_device_ids=group.local_device_ids(devices_per_node, num_visible) if has_gpu else None,
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    logger.info("%d processes joined", jax.process_count())  # the same words in all: the launcher shows them once


def end_with_launcher() -> None:
    """Has this process end at once when the launcher that started it, if one did, is gone."""
    if (number := os.environ.pop(LIFELINE, None)) is None:
        return
    lifeline = int(number)
    os.set_inheritable(lifeline, False)  # its name is gone from the environment, so it is nothing to our children

    def wait() -> None:
        os.read(lifeline, 1)  # returns when the other end is closed: nothing is written to it
        try:
            logger.error("the launcher is gone, so this process ends")
        finally:  # there may be no console any more
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def leave(code: int) -> NoReturn:
    """Ends this process at once, as a failed one must: an orderly end would wait for the others, and they for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_process(error: Exception) -> str | None:
    """Returns what an error says of a process that is gone, None where it is about something else.

    A program that waits for its result raises a ValueError there, one whose result is awaited later JAX's own error.
    """
    text = str(error).partition("\n")[0]
    return text if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and LOST.match(text) else None
