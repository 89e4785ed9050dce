"""Runs on Kubernetes: the manifest of an Indexed Job, a pod for each machine, and of the service by which they meet.

A pod that fails is started again, as are all others, since they end when one is lost; the run then continues from its
last save. A command that cannot work ends the job.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from realjax.core.exit_codes import USER_ERROR
from realjax.launch.environment import COORDINATOR, NUM_PROCESSES, PROCESS_ID, PROCESSES_PER_NODE

Manifest: TypeAlias = dict[str, object]
PORT = 29500
LONGEST_NAME = 50  # of a label's 63 characters, with room for the pod's number
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"  # of a pod among those of its job
# Time to save when a pod is asked to end.
NOTICE_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class KubernetesJob:
    """A run as an Indexed Job: its command in each of `n_nodes` pods, which have all accelerators of their machines."""

    name: str
    command: tuple[str, ...]
    image: str
    n_nodes: int
    gpus_per_node: int
    claim: str  # the persistent volume claim that every pod mounts at `mount`: models, data and fileroot
    mount: str
    namespace: str | None = None
    num_restarts: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    def render(self) -> str:
        """Returns the manifests, for `kubectl apply`."""
        return yaml.safe_dump_all([self.service(), self.job()], sort_keys=False)

    @property
    def label(self) -> str:
        """The name as Kubernetes takes it: lower case, digits and dashes."""
        label = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"r-{label}"[:LONGEST_NAME].rstrip("-")

    def service(self) -> Manifest:
        """Returns the service that gives each pod a name."""
        spec = {
            "clusterIP": "None",
            "selector": {"job-name": self.label},
            "publishNotReadyAddresses": True,  # they meet before they are ready
            "ports": [{"name": "coordinator", "port": PORT}],
        }
        return {"apiVersion": "v1", "kind": "Service", "metadata": self._metadata(), "spec": spec}

    def job(self) -> Manifest:
        """Returns the job."""
        spec = {
            "completionMode": "Indexed",
            "completions": self.n_nodes,
            "parallelism": self.n_nodes,
            "backoffLimitPerIndex": self.num_restarts,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "run", "operator": "In", "values": [USER_ERROR]},
                    },
                    {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {"spec": self._pod()},
        }
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": self._metadata(), "spec": spec}

    def _metadata(self) -> Manifest:
        return {"name": self.label, **({} if self.namespace is None else {"namespace": self.namespace})}

    def _pod(self) -> Manifest:
        gpus = {"nvidia.com/gpu": str(self.gpus_per_node)} if self.gpus_per_node else {}
        container = {
            "name": "run",
            "image": self.image,
            "command": list(self.command),
            "env": self._environment(),
            "ports": [{"containerPort": PORT}],
            "resources": {"limits": gpus},
            "volumeMounts": [{"name": "files", "mountPath": self.mount}, {"name": "memory", "mountPath": "/dev/shm"}],
        }
        return {
            "subdomain": self.label,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": NOTICE_SECONDS,
            "containers": [container],
            "volumes": [
                {"name": "files", "persistentVolumeClaim": {"claimName": self.claim}},
                {"name": "memory", "emptyDir": {"medium": "Memory"}},  # NCCL's, which needs more than the usual 64 MiB
            ],
        }

    def _environment(self) -> list[Manifest]:
        fixed = dict(self.environment)
        if self.n_nodes > 1:
            fixed |= {
                COORDINATOR: f"{self.label}-0.{self.label}:{PORT}",
                NUM_PROCESSES: str(self.n_nodes),
                PROCESSES_PER_NODE: "1",
            }
        own = [{"name": PROCESS_ID, "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}] if self.n_nodes > 1 else []
        return [*({"name": name, "value": value} for name, value in fixed.items()), *own]
