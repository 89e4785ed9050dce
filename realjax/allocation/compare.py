"""A searched plan beside those that rules make, all of them under the same model of the cluster."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from realjax.allocation.allocate import place_calls
from realjax.allocation.balance import find_cut, has_open_cut
from realjax.allocation.cluster import Cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.costing import Costs
from realjax.allocation.modes import check_options
from realjax.allocation.run_workload import read_workload
from realjax.allocation.search import Limits, SearchResult, list_single_layouts, place_choices, search
from realjax.allocation.workload import Workload
from realjax.core.json_text import JsonObject
from realjax.core.layout import ParallelStrategy
from realjax.dataflow.run import RunSpec

SEARCH, SINGLE = "search", "best single layout"
MODES = ("heuristic", "pipe_model", "pipe_data")


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A plan, or why there is none."""

    name: str
    result: SearchResult | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanComparison:
    """The searched plan of a run on a cluster, and the others. Predicted, never measured."""

    spec: RunSpec
    cluster: Cluster
    workload: Workload
    searched: SearchResult
    others: tuple[Alternative, ...]
    single: tuple[SearchResult, ...]  # all calls in one layout, each such layout, the fastest first

    def to_json(self) -> JsonObject:
        """Returns all of it as plain values."""
        plans = {SEARCH: self.searched, **{one.name: one.result for one in self.others if one.result}}
        plans |= {name_layout(result): result for result in self.single}
        return {
            "experiment": self.spec.experiment,
            "cluster": self.cluster.name,
            "plans": {name: describe_plan(result) for name, result in plans.items()},
            "gains": self.gains(),
            "problems": {one.name: one.problem for one in self.others if one.problem},
        }

    def gains(self) -> dict[str, float]:
        """Returns how many times as fast as each other plan the searched one is."""
        seconds = self.searched.prediction.seconds
        return {one.name: one.result.prediction.seconds / seconds for one in self.others if one.result}


def compare(spec: RunSpec, cluster: Cluster) -> PlanComparison:
    """Returns the plan of a run in mode `search` and those of other modes. Raises ValueError where nothing fits.

    Plans by rule get the micro-batches, ZeRO stages, remat and slots that suit them: layouts are what is compared. The
    search begins with them too, so it is no worse than any.
    """
    workload, costs, planner = (
        read_workload(spec, cluster.platform),
        ClusterCosts(cluster=cluster),
        spec.allocation.planner,
    )
    limits = Limits(seed=planner.seed, most_plans=planner.evaluations)
    others = [*place_by_rules(spec, workload, cluster, costs, limits)]
    try:
        single = list_single_layouts(workload, cluster, costs, limits)
        others.append(Alternative(name=SINGLE, result=single[0]))
    except ValueError as error:
        single = []
        others.append(Alternative(name=SINGLE, problem=str(error)))
    starts = [one.result.choices for one in others if one.result]
    return PlanComparison(
        spec=spec,
        cluster=cluster,
        workload=workload,
        searched=search(workload, cluster, costs, limits, starts=starts),
        others=tuple(others),
        single=tuple(single),
    )


def place_by_rules(
    spec: RunSpec, workload: Workload, cluster: Cluster, costs: Costs, limits: Limits
) -> Iterator[Alternative]:
    """Yields the plans of the modes that are rules."""
    for mode in MODES:
        ruled = replace(spec, allocation=replace(spec.allocation, mode=mode))

        def place(ruled: RunSpec = ruled) -> SearchResult:
            check_options(ruled.allocation)
            cut = find_cut(ruled, cluster) if has_open_cut(ruled) else None
            return place_choices(workload, cluster, costs, place_calls(ruled, cut), limits)

        yield attempt(mode, place)


def attempt(name: str, make: Callable[[], SearchResult]) -> Alternative:
    """Returns a plan by name, or why there is none."""
    try:
        return Alternative(name=name, result=make())
    except ValueError as error:
        return Alternative(name=name, problem=str(error))


def name_layout(single: SearchResult) -> str:
    """Returns the sizes that all calls of a plan have."""
    sizes = single.prediction.calls[0].choice.strategy
    return f"all {ParallelStrategy(dp=sizes.dp, pp=sizes.pp, tp=sizes.tp)}"


def describe_plan(result: SearchResult) -> JsonObject:
    """Returns a plan as plain values: seconds are predicted."""
    return {
        "predicted_seconds": result.prediction.seconds,
        "is_optimal": result.is_optimal,
        "num_plans": result.num_plans,
        "calls": {
            call.name: {
                **call.choice.to_json(),
                "parameters": call.source,
                "start": call.start,
                "seconds": call.seconds,
                "move_seconds": call.move_seconds,
                "moved_bytes": call.moved_bytes,
                "peak_bytes": call.peak_bytes,
            }
            for call in result.prediction.calls
        },
    }
