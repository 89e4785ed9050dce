"""What the simulator asks: what calls, homes and moves cost. `cluster_costs` answers for a cluster."""

from dataclasses import dataclass
from typing import Protocol

from realjax.allocation.choice import Choice
from realjax.allocation.workload import CallWork, RoleWork


@dataclass(frozen=True, kw_only=True)
class Move:
    """Parameters on their way to a call."""

    seconds: float
    bytes: float


FREE = Move(seconds=0.0, bytes=0.0)


class Costs(Protocol):
    """What calls and moves cost. Equal devices are alike: a part of a node costs the same wherever it lies."""

    @property
    def margin(self) -> float:
        """The share by which bytes may be more than said."""
        ...

    def call_seconds(self, work: CallWork, choice: Choice) -> float:
        """Of a step, parameters in place."""
        ...

    def home_bytes(self, role: RoleWork, work: CallWork, choice: Choice) -> float:
        """That stay on each device of a role's home, which is the layout of the call `work`."""
        ...

    def call_bytes(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool) -> float:
        """On each device while the call runs, beside what is at home; a copy of the parameters where it has one."""
        ...

    def advise(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool, excess_bytes: float) -> str:
        """Returns in words what to change of a call that needs so many bytes less."""
        ...

    def move(self, role: RoleWork, source: Choice, destination: Choice) -> Move:
        """From the home layout to a call's."""
        ...

    def fetch(self, role: RoleWork, destination: Choice) -> Move:
        """From host memory to a call's layout."""
        ...
