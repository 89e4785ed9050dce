"""What a run's plan is predicted to take: the simulator, with the costs of the machine that it runs on."""

import logging
from collections.abc import Sequence

import jax

from realjax.allocation.choice import Choices
from realjax.allocation.cluster import Cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.machine import find_machine
from realjax.allocation.run_prediction import RunPrediction
from realjax.allocation.run_workload import read_workload
from realjax.allocation.simulate import simulate
from realjax.allocation.workload import Workload
from realjax.dataflow.run import RunSpec

logger = logging.getLogger("realjax.allocation")


def predict_run(spec: RunSpec, choices: Choices, devices: Sequence[jax.Device]) -> RunPrediction | None:
    """Returns what a step of the run is predicted to take; None, with a line of the log, where nothing is known.

    Raises ValueError for a description of the cluster that cannot be read. A run needs no prediction: what the cost
    model has no figures for, such as a dtype without a rate, ends none.
    """
    if (machine := find_machine(spec.allocation, devices)) is None:
        logger.info("no prediction: %s is not known; measure it with realjax profile", devices[0].device_kind)
        return None
    workload = read_workload(spec, devices[0].platform)
    try:
        return predict(workload, choices, machine.cluster, source=machine.source)
    except ValueError as error:
        logger.info("no prediction: %s", error)
        return None


def predict(workload: Workload, choices: Choices, cluster: Cluster, *, source: str) -> RunPrediction:
    """Returns what a step is predicted to take."""
    step = simulate(workload, choices, ClusterCosts(cluster=cluster), cluster)
    # A run's clock of a call starts when its parameters do.
    seconds = {call.name: call.move_seconds + call.seconds for call in step.calls}
    return RunPrediction(
        seconds=seconds,
        peak_bytes={call.name: call.peak_bytes for call in step.calls},
        step_seconds=step.seconds,
        kinds={call.name: call.kind for call in workload.calls},
        cluster=cluster,
        source=source,
    )
