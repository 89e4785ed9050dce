"""A process finds its place in what a launcher or Slurm says, and takes its own share of its node's devices."""

import jax
import numpy as np
import pytest

from realjax.core.processes import from_first, gather, largest, text_from_first
from realjax.launch.environment import find_process_group
from realjax.reshard.fetch import fetch
from tests.given.models import make_layout

LAUNCHED = {
    "REALJAX_COORDINATOR": "10.0.0.1:1234",
    "REALJAX_NUM_PROCESSES": "4",
    "REALJAX_PROCESS_ID": "3",
    "REALJAX_PROCESSES_PER_NODE": "2",
}


def slurm(*, tasks: int, nodes: int, task: int, local: int) -> dict[str, str]:
    """Returns what `srun` tells a task."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": f"node[01-{nodes:02}]",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(local),
    }


def find(environ: dict[str, str]):
    group = find_process_group(environ)
    assert group is not None
    return group


def test_one_process_is_no_group():
    assert find_process_group({}) is None
    assert find_process_group(slurm(tasks=1, nodes=1, task=0, local=0)) is None
    # Inside an allocation, but not started by srun: such a process runs alone.
    batch_script = slurm(tasks=8, nodes=1, task=0, local=0)
    del batch_script["SLURM_STEP_NODELIST"]
    assert find_process_group(batch_script) is None


def test_a_launcher_goes_before_slurm():
    for environ in (LAUNCHED, LAUNCHED | slurm(tasks=2, nodes=2, task=1, local=0)):
        group = find(environ)
        assert (group.coordinator, group.num_processes, group.process_id) == ("10.0.0.1:1234", 4, 3)
        assert (group.processes_per_node, group.local_id) == (2, 1)
    alone = {name: value for name, value in LAUNCHED.items() if name != "REALJAX_PROCESSES_PER_NODE"}
    assert (find(alone).processes_per_node, find(alone).local_id) == (1, 0)


def test_under_slurm_jax_finds_the_coordinator():
    group = find(slurm(tasks=4, nodes=2, task=3, local=1))
    assert (group.coordinator, group.num_processes, group.process_id) == (None, 4, 3)
    assert (group.processes_per_node, group.local_id) == (2, 1)


@pytest.mark.parametrize("num_nodes", [1, 2, 3])
@pytest.mark.parametrize("per_node", [1, 2, 4, 8])
@pytest.mark.parametrize("deal", ["block", "cyclic"])
def test_the_processes_of_a_node_share_all_its_devices(num_nodes, per_node, deal):
    num_tasks, devices_per_node = num_nodes * per_node, 8
    if num_tasks == 1:
        return
    nodes: dict[int, list[int]] = {}
    for task in range(num_tasks):
        node, local = divmod(task, per_node) if deal == "block" else (task % num_nodes, task // num_nodes)
        group = find(slurm(tasks=num_tasks, nodes=num_nodes, task=task, local=local))
        nodes.setdefault(node, []).extend(group.local_device_ids(devices_per_node))
        # A cluster that shows a task only its own devices counts them from 0.
        share = devices_per_node // per_node
        assert group.local_device_ids(devices_per_node, num_visible=share) == list(range(share))
    assert [sorted(ids) for ids in nodes.values()] == [list(range(devices_per_node))] * num_nodes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"REALJAX_NUM_PROCESSES": ""}, r"^REALJAX_NUM_PROCESSES: found ''; a run of several processes needs"),
        ({"REALJAX_PROCESS_ID": "one"}, r"^REALJAX_PROCESS_ID: found 'one'; .* launch.local sets them"),
        ({"REALJAX_PROCESS_ID": "4"}, r"^processes: process 4 of 4, 2 a node; numbers start at 0"),
        ({"REALJAX_PROCESSES_PER_NODE": "0"}, r"^processes: process 3 of 4, 0 a node; .* at least one"),
    ],
)
def test_an_incomplete_description_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        find_process_group(LAUNCHED | change)


def test_slurm_must_say_all_of_it():
    environ = slurm(tasks=4, nodes=2, task=3, local=1)
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES"):
        with pytest.raises(ValueError, match=rf"^{name}: found ''"):
            find_process_group({key: value for key, value in environ.items() if key != name})


def test_a_process_alone_agrees_with_itself():
    assert from_first(0.1) == 0.1
    assert text_from_first("a trial") == "a trial"
    assert largest(143) == 143
    times = np.array([[0.1, 1e9 + 1e-6], [2.5, 3.0]])
    np.testing.assert_array_equal(gather(times), times[None])


def test_scalars_come_to_the_host_as_they_are():
    layout = make_layout(dp=2)
    tree = {"loss": np.float32(0.1), "count": np.int32(7)}
    found = fetch(jax.device_put(tree, layout.replicated))
    assert found == tree
    assert {name: np.asarray(value).dtype for name, value in found.items()} == {"loss": "float32", "count": "int32"}
