"""Runs on a Ray cluster: an actor for each process, which starts it where a placement group has put it.

The output of all is merged here, as that of processes on this machine is. When one fails, or its actor dies, all are
ended, and started again with recover_mode=auto, at most recover_retries times.
"""

import importlib
import importlib.util
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from realjax.core.lifetime import make_bond
from realjax.launch.environment import COORDINATOR, NUM_PROCESSES, PROCESS_ID, PROCESSES_PER_NODE
from realjax.launch.local import Filter, Running, free_port, run_again, wait_for_all
from realjax.launch.output import MergedOutput

PLACE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """A run: its command in each of `num_processes` processes, those of a node next to each other."""

    command: tuple[str, ...]
    num_processes: int
    processes_per_node: int
    gpus_per_process: int = 0
    cpus_per_process: int = 1
    num_restarts: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, address: str) -> int:
        """Runs the job on the cluster at `address` to its end and returns its exit code; again after a failure.

        ValueError where there is no such cluster, or no room in it.
        """
        ray = import_ray()
        try:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"ray: no cluster at '{address}' ({reason}); start one with ray start --head, or give another --address"
            ) from error
        try:
            return run_again(lambda running: self._run_once(ray, running), self.num_restarts)
        finally:
            ray.shutdown()

    def _run_once(self, ray: ModuleType, running: Running) -> int:
        util = importlib.import_module("ray.util")
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        bundle = {"CPU": self.cpus_per_process} | ({"GPU": self.gpus_per_process} if self.gpus_per_process else {})
        strategy = "SPREAD" if self.processes_per_node == 1 else "PACK"
        group = util.placement_group([bundle] * self.num_processes, strategy=strategy)
        try:
            if not group.wait(PLACE_SECONDS):
                raise ValueError(
                    f"ray: no room for {self.num_processes} processes with {bundle} each within {PLACE_SECONDS:.0f} s; "
                    "lower n_nodes and n_gpus_per_node, or wait for others' jobs"
                )
            host = ray.remote(Host)
            actors = [
                host.options(
                    num_cpus=self.cpus_per_process,
                    num_gpus=self.gpus_per_process,
                    max_concurrency=2,  # a signal has to pass while the process runs
                    scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                        placement_group=group, placement_group_bundle_index=i
                    ),
                ).remote()
                for i in range(self.num_processes)
            ]
            addresses = ray.get([actor.find_address.remote() for actor in actors])
            # Those of a node follow each other.
            placed = sorted(zip(addresses, actors, strict=True), key=lambda one: one[0].rpartition(":")[0])
            with MergedOutput(self.num_processes) as output:
                running.processes[:] = [
                    RemoteProcess(ray, actor, i, self._environment(placed[0][0], i), self.command, output)
                    for i, (_, actor) in enumerate(placed)
                ]
                return wait_for_all(running.processes, running.signals)
        finally:
            util.remove_placement_group(group)  # which kills what is left in it

    def _environment(self, coordinator: str, number: int) -> dict[str, str]:
        if self.num_processes == 1:
            return dict(self.environment)
        return {
            **self.environment,
            COORDINATOR: coordinator,
            NUM_PROCESSES: str(self.num_processes),
            PROCESSES_PER_NODE: str(self.processes_per_node),
            PROCESS_ID: str(number),
        }


class Host:
    """The actor: one process of the run is its child, and ends with it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def find_address(self) -> str:
        """Returns an address of this node at which nobody listens."""
        return f"{importlib.import_module('ray.util').get_node_ip_address()}:{free_port()}"

    def run(self, command: Sequence[str], environment: Mapping[str, str], folder: str) -> Iterator[str | int]:
        """Yields the process's lines, then its exit code."""
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=folder if os.path.isdir(folder) else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
            preexec_fn=make_bond(),
        )
        assert self.process.stdout is not None
        # Ray's generators fail in `yield from` a file.
        for line in self.process.stdout:  # noqa: UP028
            yield line
        yield self.process.wait()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, if it runs."""
        if self.process is not None:
            self.process.send_signal(number)


class RemoteProcess:
    """What `Popen` is to a process here: a thread copies its output and learns its exit code."""

    def __init__(
        self,
        ray: ModuleType,
        actor: Any,
        number: int,
        environment: Mapping[str, str],
        command: Sequence[str],
        output: MergedOutput,
    ) -> None:
        self.returncode: int | None = None
        self._ray, self._actor = ray, actor
        run = actor.run.options(num_returns="streaming")
        items = run.remote(list(command), dict(environment), os.getcwd())
        threading.Thread(target=self._copy, args=(items, number, output), daemon=True).start()

    def _copy(self, items: Iterator[Any], number: int, output: MergedOutput) -> None:
        lines, code = Filter(number, output), -signal.SIGKILL
        try:
            for item in items:
                value = self._ray.get(item)
                if isinstance(value, str):
                    lines.write(value)
                else:
                    code = value
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().rpartition("\n")[2]
            lines.write(f"launch: its actor is gone: {reason}\n")
        lines.close()
        self.returncode = code

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.returncode is None:
            self._actor.send_signal.remote(int(sig))

    def kill(self) -> None:
        self._ray.kill(self._actor)


def import_ray() -> ModuleType:
    """Returns Ray. ValueError where it is not installed."""
    if not is_installed():
        raise ValueError("ray: not installed in this Python; install the extra realjax[ray], or set mode=local")
    return importlib.import_module("ray")


def is_installed() -> bool:
    """Returns whether Ray is there to be imported."""
    return importlib.util.find_spec("ray") is not None
