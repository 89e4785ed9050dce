"""The plan of a run: where each call runs, where each role lives, and which roles wait in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass

from realjax.core.layout import Layout
from realjax.dataflow.graph import MFC, DataflowGraph


@dataclass(frozen=True, kw_only=True)
class AllocationPlan:
    """Layouts by call, home layouts by role, and the roles whose parameters are in host memory between their calls."""

    layouts: Mapping[str, Layout]
    roles: Mapping[str, str]  # by call
    homes: Mapping[str, Layout]
    offloaded: frozenset[str]

    def describe(self) -> str:
        """Returns a line per call: its layout, and how its role's parameters get there."""
        width = max(map(len, self.roles))
        return "\n".join(f"{call:<{width}}  {self.layouts[call]}  {self._source(call)}" for call in self.roles)

    def _source(self, call: str) -> str:
        role, home = self.roles[call], self.homes[self.roles[call]]
        if role in self.offloaded:
            return f"{role} from host memory"
        return f"{role} at home" if home == self.layouts[call] else f"{role} from its home {home}"


def make_plan(
    graph: DataflowGraph, layouts: Mapping[str, Layout], offload: Mapping[str, bool | None] | None = None
) -> AllocationPlan:
    """Returns the plan for these layouts by call.

    A trained role lives where it is trained, another where its first call runs. A role that is never trained and
    shares a device with a call of another role is offloaded; `offload` by role decides otherwise where it is not None.
    Raises ValueError for a call without a layout, or a trained role that is to be offloaded.
    """
    if missing := [mfc.name for mfc in graph.mfcs if mfc.name not in layouts]:
        raise ValueError(f"allocation: no layout for {', '.join(missing)}; give each call one")
    homes, offloaded = {}, set()
    for role in graph.roles:
        own = [mfc for mfc in graph.mfcs if mfc.role == role]
        train = graph.train_call(role)
        homes[role] = layouts[(train or own[0]).name]
        devices = {device for mfc in own for device in layouts[mfc.name].devices}
        others = {device for mfc in graph.mfcs if mfc.role != role for device in layouts[mfc.name].devices}
        wanted = (offload or {}).get(role)
        if train is not None and wanted:
            raise ValueError(
                f"{role}.offload: a role that is trained stays on its devices, where its masters and moments are "
                "updated; set it to False or null"
            )
        if train is None and (bool(devices & others) if wanted is None else wanted):
            offloaded.add(role)
    roles = {call.name: call.role for call in graph.order if isinstance(call, MFC)}
    return AllocationPlan(layouts=layouts, roles=roles, homes=homes, offloaded=frozenset(offloaded))
