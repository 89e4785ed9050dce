"""Micro-batches by memory: as few as the devices have room for, in calls that say nothing of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import jax

from realjax.allocation.allocate import lay_out, read_choices
from realjax.allocation.candidates import num_update_sequences
from realjax.allocation.cluster import Cluster, find_cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.machine import find_machine
from realjax.allocation.prediction import GIB, Prediction
from realjax.allocation.run_workload import read_workload
from realjax.allocation.shapes import shape_rollouts
from realjax.allocation.simulate import USABLE_SHARE, simulate
from realjax.core.host_memory import total_bytes
from realjax.core.processes import largest
from realjax.dataflow.graph import Call, DataflowGraph, Inference, MicroBatches, Train
from realjax.dataflow.run import AllocationOptions, Evaluation, RolloutEvaluation, RunSpec

logger = logging.getLogger("realjax.allocation")
HOST_SHARE = 0.75  # of a host's memory that is for its devices: the rest is for data, and for others
LIKE = "h100"  # whose rates stand for those of an unknown kind, where memory alone is looked at
AnyCall = TypeVar("AnyCall", bound=Call)


def fit_micro_batches(spec: RunSpec, devices: Sequence[jax.Device], memory_bytes: int | None = None) -> RunSpec:
    """Returns the run with the fewest micro-batches, a power of two, with which each call is predicted to fit.

    Calls whose `n_mbs` or `max_tokens_per_mb` is given keep it. A step that fits as it is, stays as it is; of one that
    never does, a warning says what would help. `memory_bytes` of a device stands for what the machine says.
    """
    named = {mfc.name for mfc in spec.graph.mfcs if is_open(mfc)}
    if not named:
        return spec
    try:
        counts, step = count_micro_batches(spec, devices, named, memory_bytes)
    except ValueError as error:
        # A run needs no prediction: what the model of memory has no figures for ends none.
        logger.debug("micro-batches are not fitted: %s", error)
        return spec
    for name, count in counts.items():
        peak = next(call.peak_bytes for call in step.calls if call.name == name) / GIB
        options = next(mfc.placement for mfc in spec.graph.mfcs if mfc.name == name)
        logger.info(
            "%s: %d micro-batches, with which %.3g of %.3g GiB of a device are predicted; %s.n_mbs sets another number",
            name, count, peak, step.usable_bytes / GIB, options,
        )  # fmt: skip
    return apply_counts(spec, counts)


def is_open(call: object) -> bool:
    """Returns whether nothing is said of a call's micro-batches."""
    return isinstance(call, Inference | Train) and call.micro_batches == MicroBatches()


def count_micro_batches(
    spec: RunSpec, devices: Sequence[jax.Device], named: set[str], memory_bytes: int | None
) -> tuple[dict[str, int], Prediction]:
    """Returns the numbers of micro-batches of those of the calls `named` that need several, and the step with them.

    Raises ValueError for what the cost model has no figures for.
    """
    cluster = describe_memory(spec.allocation, devices, memory_bytes)
    workload = read_workload(spec, devices[0].platform)
    layouts = lay_out(spec, devices)
    choices = read_choices(spec, layouts, shape_rollouts(spec, layouts), devices)
    work = {call.name: call for call in workload.calls}
    most = {name: num_update_sequences(work[name]) // choices[name].strategy.row_multiple for name in named}
    costs = ClusterCosts(cluster=cluster)
    while True:
        step = simulate(workload, choices, costs, cluster)
        tight = [call for call in step.calls if call.peak_bytes > step.usable_bytes]
        wanted = [call.name for call in tight if 2 * choices[call.name].num_mbs <= most.get(call.name, 0)]
        if not wanted:
            break
        choices |= {name: replace(choices[name], num_mbs=2 * choices[name].num_mbs) for name in wanted}
    for call in tight:
        excess, role = call.peak_bytes - step.usable_bytes, workload.roles[call.role]
        at_home = call.source == "home"
        advice = costs.advise(role, work[call.name], call.choice, at_home=at_home, excess_bytes=excess)
        logger.warning(
            "%s is predicted to need %.1f GiB a device more than there is: %s", call.name, excess / GIB, advice
        )
    return {name: choices[name].num_mbs for name in sorted(named) if choices[name].num_mbs > 1}, step


def describe_memory(options: AllocationOptions, devices: Sequence[jax.Device], memory_bytes: int | None) -> Cluster:
    """Returns the run's machine with the memory that its devices have, which on CPUs is a share of the host's."""
    machine = find_machine(options, devices)
    sizes = {"num_nodes": options.n_nodes, "devices_per_node": options.n_gpus_per_node}
    cluster = replace(find_cluster(LIKE), **sizes) if machine is None else machine.cluster
    if memory_bytes is None and options.planner.cluster is None:
        memory_bytes = measure_memory(devices)
    return cluster if memory_bytes is None else replace(cluster, memory_bytes=memory_bytes)


def measure_memory(devices: Sequence[jax.Device]) -> int | None:
    """Returns the bytes of a device; None where it does not say. The same at each start, so that a resume has the same
    micro-batches, and the least of all processes, which run one program. Every process must call this.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    if devices[0].platform == "cpu":
        own = int(total_bytes() * HOST_SHARE) // max(1, len(local))
    else:
        stats = local[0].memory_stats() if local else None
        # The limit is what the run's settings leave of the device, see `USABLE_SHARE`.
        own = int(stats["bytes_limit"] / USABLE_SHARE) if stats and "bytes_limit" in stats else 0
    return -largest(-own) or None


def apply_counts(spec: RunSpec, counts: Mapping[str, int]) -> RunSpec:
    """Returns the run with so many micro-batches in calls by name, and in those of evaluations that run as they do."""
    if not counts:
        return spec

    # Calls of evaluations have other names, and the options of those of the graph.
    by_options = {mfc.placement: counts[mfc.name] for mfc in spec.graph.mfcs if mfc.name in counts}

    def adapt(call: AnyCall) -> AnyCall:
        if not isinstance(call, Inference | Train) or call.placement not in by_options or not is_open(call):
            return call
        return replace(call, micro_batches=MicroBatches(count=counts.get(call.name, by_options[call.placement])))

    def adapt_evaluation(evaluation: Evaluation | RolloutEvaluation) -> Evaluation | RolloutEvaluation:
        if isinstance(evaluation, RolloutEvaluation):
            variants = {name: tuple(map(adapt, calls)) for name, calls in evaluation.variants.items()}
            return replace(evaluation, variants=variants)
        trained = spec.graph.train_call(evaluation.role)
        own = evaluation.micro_batches
        if trained is not None and trained.name in counts and own == MicroBatches():
            own = MicroBatches(count=counts[trained.name])
        return replace(evaluation, calls=tuple(map(adapt, evaluation.calls)), micro_batches=own)

    return replace(
        spec,
        graph=DataflowGraph(tuple(map(adapt, spec.graph.calls)), spec.graph.dataset_keys),
        evaluations={name: adapt_evaluation(evaluation) for name, evaluation in spec.evaluations.items()},
    )
