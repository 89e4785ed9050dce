"""A step as predicted: its calls, its timeline, what its devices hold. Predicted, never measured."""

from dataclasses import dataclass
from typing import Literal

from realjax.allocation.choice import Choice
from realjax.core.layout import number_ranges

GIB = 2**30
HEAD = ("call", "devices", "strategy", "parameters", "moved GiB", "move s", "start s", "seconds", "peak GiB")
What = Literal["move", "fetch", "call"]  # that devices are busy with
Source = Literal["home", "moved", "host"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of the timeline, in seconds from the step's start."""

    name: str  # of the call
    what: What
    devices: tuple[int, ...]
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class CallPrediction:
    """A call of a step as predicted; times in seconds from the step's start."""

    name: str
    role: str
    choice: Choice
    source: Source  # of its parameters
    start: float  # its parameters in place
    end: float
    move_seconds: float
    moved_bytes: float
    peak_bytes: float  # on the fullest of its devices while it runs, with all that lives there

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def row(self) -> tuple[str, ...]:
        """Returns its cells below `HEAD`."""
        moved = (f"{self.moved_bytes / GIB:.1f}", f"{self.move_seconds:.2f}") if self.source != "home" else ("", "")
        times = (f"{self.start:.2f}", f"{self.seconds:.2f}", f"{self.peak_bytes / GIB:.1f}")
        return self.name, number_ranges(self.choice.devices), str(self.choice), self.source, *moved, *times


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step as predicted, never measured."""

    calls: tuple[CallPrediction, ...]
    spans: tuple[Span, ...]  # the timeline, in the order of dispatch
    seconds: float
    device_bytes: tuple[float, ...]  # the peak of each device
    usable_bytes: float  # of a device, less the margin of what is predicted
    offloaded: frozenset[str]  # roles whose parameters wait in host memory

    @property
    def fits(self) -> bool:
        return max(self.device_bytes) <= self.usable_bytes

    @property
    def moved_bytes(self) -> float:
        return sum(call.moved_bytes for call in self.calls)

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the calls' cells below `HEAD`."""
        return [call.row() for call in self.calls]
