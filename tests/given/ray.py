"""A real Ray of two nodes on this machine, for tests of jobs."""

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from realjax.launch.ray import is_installed
from tests.given.processes import ROOT

needs_ray = pytest.mark.skipif(not is_installed(), reason="Ray is not installed: the extra realjax[ray]")


@contextmanager
def ray_cluster(cpus_per_node: int) -> Iterator[str]:
    """Gives the address of a cluster of two nodes with so many CPUs each, which ends with the block."""
    with pytest.MonkeyPatch.context() as patch:
        # Processes that actors start have what a node's daemon was started in.
        patch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        # On a machine that others use too: nobody is killed for what they take, or comes after them.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster_utils = importlib.import_module("ray.cluster_utils")
        node = {"num_cpus": cpus_per_node, "object_store_memory": 2**27}
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            cluster.add_node(**node)
            yield cluster.address
        finally:
            cluster.shutdown()
            gc.collect()  # here its open files and sockets are ignored, in the next test they are errors
