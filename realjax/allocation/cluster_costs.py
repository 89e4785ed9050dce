"""The costs that the simulator plays a step through with: those of the cost and the memory model on a cluster."""

from dataclasses import dataclass

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.cost import call_cost, fetch_cost, move_cost
from realjax.allocation.memory import call_memory, home_memory
from realjax.allocation.simulate import Move
from realjax.allocation.split import item_bytes
from realjax.allocation.workload import CallWork, RoleWork


@dataclass(frozen=True, kw_only=True)
class ClusterCosts:
    """`simulate.Costs` of a cluster. A move's bytes are those of all copies in a layout, as if none were there yet."""

    cluster: Cluster

    def call_seconds(self, work: CallWork, choice: Choice) -> float:
        return call_cost(work, choice, self.cluster).seconds

    def home_bytes(self, role: RoleWork, work: CallWork, choice: Choice) -> float:
        return home_memory(role, work, choice).bytes

    def call_bytes(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool) -> float:
        return call_memory(work, role, choice, at_home=at_home).bytes

    def move(self, role: RoleWork, source: Choice, destination: Choice) -> Move:
        seconds = move_cost(role, source, destination, self.cluster).seconds
        return Move(seconds=seconds, bytes=_copied_bytes(role, destination))

    def fetch(self, role: RoleWork, destination: Choice) -> Move:
        seconds = fetch_cost(role, destination, self.cluster).seconds
        return Move(seconds=seconds, bytes=_copied_bytes(role, destination))


def _copied_bytes(role: RoleWork, choice: Choice) -> float:
    strategy = choice.strategy
    copies = 1 if strategy.zero_stage == 3 else strategy.dp
    return role.model.num_params * item_bytes(role.dtype) * copies
