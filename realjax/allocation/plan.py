"""The plan of a run: where each call runs, where each role lives, and the shapes that follow."""

from collections.abc import Mapping
from dataclasses import dataclass

from realjax.allocation.choice import Choices
from realjax.allocation.run_prediction import RunPrediction
from realjax.core.layout import Layout
from realjax.data.loader import Loader


@dataclass(frozen=True, kw_only=True)
class TailShape:
    """Where the last answers of a generate call are decoded, and how many at once."""

    layout: Layout
    num_slots: int


@dataclass(frozen=True, kw_only=True)
class RolloutShape:
    """Of a generate call: the rows that its answers are packed in, and how many answers are decoded at once."""

    row_len: int
    row_multiple: int  # what the number of rows is a multiple of
    num_slots: int
    tail: TailShape | None = None  # None: where the others are


@dataclass(frozen=True, kw_only=True)
class AllocationPlan:
    """Layouts and row multiples by call, homes by role, and what of the run's shapes depends on them."""

    layouts: Mapping[str, Layout]  # by call, those of evaluations too
    roles: Mapping[str, str]  # by call
    homes: Mapping[str, Layout]  # by role
    offloaded: frozenset[str]  # roles whose parameters are in host memory between their calls
    empty_layers: Mapping[str, int]  # by role: behind the model's own, so that pipeline stages are equal
    row_multiples: Mapping[str, int]  # by call: of its rows, so that devices and micro-batches divide them
    rollouts: Mapping[str, RolloutShape]  # by generate call
    loader: Loader  # of batches that divide over the calls that read them
    held_out: Mapping[str, Loader]  # by the name of the set
    choices: Choices  # by call of the graph: what the planner calls the same
    is_searched: bool  # rather than made by rule or by hand
    idle: str  # numbers of the devices that no call uses, as '6,7'
    predicted: RunPrediction | None = None

    def describe(self) -> str:
        """Returns a line per call, its layout and how its role's parameters get there; then the shapes of batches."""
        width = max(map(len, self.roles))
        lines = [
            f"{call:<{width}}  {self.layouts[call]}  {self._source(call)}{self._predicted(call)}" for call in self.roles
        ]
        if self.predicted is not None:
            lines.append(f"predicted by {self.predicted.source}: {self.predicted.step_seconds:.3g} s a step")
        lines += [
            f"{call}: {shape.num_slots} answers decoded at once; rows of {shape.row_len} tokens, in multiples of "
            f"{shape.row_multiple}" + (f"; the last {tail.num_slots} on {tail.layout}" if (tail := shape.tail) else "")
            for call, shape in self.rollouts.items()
        ]
        if not self.rollouts:
            lines.append(f"batches: {self.loader.shapes} rows x tokens")
        lines += [f"{role}: {n} empty layers, so that stages are equal" for role, n in self.empty_layers.items() if n]
        return "\n".join([*lines, f"idle devices: {self.idle}"] if self.idle else lines)

    def _predicted(self, call: str) -> str:
        is_known = self.predicted is not None and call in self.predicted.seconds
        return f"; {self.predicted.describe(call)}" if self.predicted is not None and is_known else ""

    def _source(self, call: str) -> str:
        role, home = self.roles[call], self.homes[self.roles[call]]
        if role in self.offloaded:
            return f"{role} from host memory"
        return f"{role} at home" if home == self.layouts[call] else f"{role} from its home {home}"
