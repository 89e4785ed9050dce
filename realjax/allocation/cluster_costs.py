"""The costs that the simulator plays a step through with: those of the cost and the memory model on a cluster."""

import math
from dataclasses import dataclass

from realjax.allocation import memory
from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.cost import call_cost, fetch_cost, move_cost
from realjax.allocation.costing import Move
from realjax.allocation.terms.move_cost import fetched_bytes, moved_bytes
from realjax.allocation.workload import CallWork, RoleWork


@dataclass(frozen=True, kw_only=True)
class ClusterCosts:
    """`costing.Costs` of a cluster. Predicted, never measured."""

    cluster: Cluster
    margin: float = memory.MARGIN

    def call_seconds(self, work: CallWork, choice: Choice) -> float:
        return call_cost(work, choice, self.cluster).seconds

    def home_bytes(self, role: RoleWork, work: CallWork, choice: Choice) -> float:
        return memory.home_memory(role, work, choice).bytes

    def call_bytes(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool) -> float:
        return memory.call_memory(work, role, choice, at_home=at_home).bytes

    def advise(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool, excess_bytes: float) -> str:
        return memory.smallest_change(work, role, choice, at_home=at_home, excess_bytes=math.ceil(excess_bytes))

    def move(self, role: RoleWork, source: Choice, destination: Choice) -> Move:
        seconds = move_cost(role, source, destination, self.cluster).seconds
        return Move(seconds=seconds, bytes=moved_bytes(role, source, destination, self.cluster))

    def fetch(self, role: RoleWork, destination: Choice) -> Move:
        return Move(seconds=fetch_cost(role, destination, self.cluster).seconds, bytes=fetched_bytes(role, destination))
