"""How many devices each side has where `heuristic` draws answers beside training: as a step is predicted to take."""

from dataclasses import replace

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.heuristic import place_run
from realjax.allocation.run_workload import read_workload
from realjax.allocation.shapes import count_micro_batches
from realjax.allocation.simulate import Simulator
from realjax.dataflow.graph import Generate, Train
from realjax.dataflow.run import RunSpec


def has_open_cut(spec: RunSpec) -> bool:
    """Returns whether there are two sides whose sizes can differ."""
    options = spec.allocation
    return options.mode == "heuristic" and bool(spec.graph.ahead) and options.num_devices > 2


def find_cut(spec: RunSpec, cluster: Cluster) -> int:
    """Returns how many devices, or whole nodes of them, training gets of `place_apart`: as many as make the step the
    shortest that fits, which is where both sides take about as long. Of equal ones the most even.
    """
    options = spec.allocation
    unit = options.n_gpus_per_node if options.n_nodes > 1 else 1
    workload = read_workload(spec, cluster.platform)
    simulator = Simulator(workload, ClusterCosts(cluster=cluster), cluster)
    calls = {call.name: call for call in spec.graph.mfcs}

    def judge(cut: int) -> tuple[object, ...]:
        placed = place_run(spec, cut)
        plan = []
        for work in workload.calls:
            call, role = calls[work.name], spec.roles[work.role]
            where, is_train = placed[call.placement], isinstance(call, Train)
            strategy = replace(where.strategy, zero_stage=role.zero_stage if is_train else 0)
            choice = Choice(
                strategy=strategy,
                devices=where.devices,
                num_mbs=count_micro_batches(call),
                remat=is_train and role.compute.remat,
                num_slots=call.num_slots if isinstance(call, Generate) else None,
            )
            plan.append(simulator.price(work, choice))
        return (*simulator.score(plan), abs(2 * cut - options.num_devices), cut)

    return min(range(unit, options.num_devices, unit), key=judge)
