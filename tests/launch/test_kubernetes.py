"""The manifests of a Kubernetes job: valid by the schema, and complete for JAX's processes to meet."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from jax._src.clusters import k8s_cluster
from jax._src.clusters.k8s_cluster import K8sCluster

from realjax.apps import quickstart
from realjax.launch.environment import KUBERNETES_HOST, KUBERNETES_INDEX, ProcessGroup, find_process_group
from tests.given.runs import Given, make_options

FLAGS = ["launch", "k8s", "--dry-run", "--claim", "files"]


def render(given: Given, capsys: pytest.CaptureFixture, *flags: str, **changes: object) -> list[dict]:
    options = make_options(
        "sft", given, Path("/data/runs"), **{"image_name": "image:1", "allocation_mode": "pipe_data", **changes}
    )
    words = [f"{name}={value}" for name, value in options.items()]
    assert quickstart.main([*FLAGS, *flags, "sft", *words]) == 0, capsys.readouterr().err
    return list(yaml.safe_load_all(capsys.readouterr().out))


def test_the_manifests_are_valid(given, capsys):
    validator = pytest.importorskip("kubernetes_validate", reason="the package kubernetes-validate, of the extra dev")
    for manifest in render(given, capsys, "--namespace", "us", n_nodes=2):
        validator.validate(manifest, validator.latest_version(), strict=True)
        assert manifest["metadata"]["namespace"] == "us"
    broken = render(given, capsys, n_nodes=2)[1]
    broken["spec"]["completionMod"] = "Indexed"
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, validator.latest_version(), strict=True)


def test_every_pod_finds_the_first(given, capsys):
    service, job = render(given, capsys, n_nodes=2, n_gpus_per_node=4, recover_mode="auto", recover_retries=3)
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimitPerIndex"]) == (2, 2, 3)
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environ = {one["name"]: one.get("value", "1") for one in container["env"]}
    group = find_process_group(environ)
    assert group is not None and (group.num_processes, group.process_id, group.local_id) == (2, 1, 0)
    name = job["metadata"]["name"]
    assert group.coordinator == f"{name}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"] == {"job-name": name} and service["metadata"]["name"] == pod["subdomain"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert container["command"][:4] == ["python3", "-m", "realjax.apps.quickstart", "sft"]


@contextmanager
def pod_of(job: dict, index: int) -> Iterator[None]:
    """While entered, this process is a pod of the job, and a stand-in for the package `kubernetes` answers of it."""
    known = json.loads(json.dumps(job), object_hook=lambda fields: SimpleNamespace(**fields))
    known.metadata.labels = {}
    labels, owner = {"job-name": known.metadata.name}, SimpleNamespace(kind="Job", controller=True)
    metadata = SimpleNamespace(name="pod", labels=labels, owner_references=[owner])
    pod = SimpleNamespace(
        metadata=metadata, spec=SimpleNamespace(subdomain=job["spec"]["template"]["spec"].get("subdomain"))
    )
    core = SimpleNamespace(
        list_namespaced_pod=lambda namespace, field_selector: SimpleNamespace(items=[pod]),
        list_namespaced_service=lambda namespace: SimpleNamespace(items=[]),
    )
    client = SimpleNamespace(
        CoreV1Api=lambda: core,
        BatchV1Api=lambda: SimpleNamespace(read_namespaced_job=lambda name, namespace: known),
        exceptions=SimpleNamespace(ApiException=OSError),
    )
    package = ModuleType("kubernetes")
    package.__spec__ = ModuleSpec("kubernetes", None)
    vars(package).update(client=client, config=SimpleNamespace(load_incluster_config=lambda: None))
    # JAX keeps what it has asked by the class.
    own = type("Own", (K8sCluster,), {"_namespace": classmethod(lambda cls: "us"), "opt_in_only_method": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kubernetes", package)
        patch.setattr(k8s_cluster, "K8sCluster", own)
        for name, value in {KUBERNETES_HOST: "10.0.0.1", KUBERNETES_INDEX: str(index), "HOSTNAME": "localhost"}.items():
            patch.setenv(name, value)
        yield


def test_jax_finds_the_pods_of_a_job_that_says_nothing_of_them(given, capsys):
    _, job = render(given, capsys, n_nodes=2)
    with pod_of(job, index=1):
        group = find_process_group(os.environ)
        address = k8s_cluster.K8sCluster.get_coordinator_address(None, "29500")
    assert group == ProcessGroup(coordinator=None, num_processes=2, process_id=1, processes_per_node=1, local_id=0)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {"name": "REALJAX_COORDINATOR", "value": address} in container["env"]


def test_a_job_whose_pods_cannot_meet_is_told(given, capsys):
    _, job = render(given, capsys, n_nodes=2)
    del job["spec"]["template"]["spec"]["subdomain"]
    with pod_of(job, index=1), pytest.raises(ValueError, match=r"^kubernetes: the other pods .* headless service"):
        find_process_group(os.environ)


def test_names_are_those_that_kubernetes_takes(given, capsys):
    _, job = render(given, capsys, experiment_name="An.Experiment_", trial_name="x" * 90)
    name = job["metadata"]["name"]
    assert name.startswith("r-an-experiment-x") and len(name) <= 50


def test_one_machine_is_no_group(given, capsys):
    _, job = render(given, capsys, "--no-gpus")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert find_process_group({one["name"]: one["value"] for one in container["env"]}) is None
    assert container["resources"]["limits"] == {}


@pytest.mark.parametrize(
    ("flags", "image", "message"),
    [(FLAGS, "null", "image_name: found null"), ([*FLAGS[:2], *FLAGS[3:]], "i", "launch k8s: it submits nothing")],
)
def test_what_lacks_is_told(flags, image, message, given, tmp_path, capsys):
    words = [f"{name}={value}" for name, value in make_options("sft", given, tmp_path, image_name=image).items()]
    assert quickstart.main([*flags, "sft", *words]) == 2
    assert f"realjax: error: {message}" in capsys.readouterr().err
