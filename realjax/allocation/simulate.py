"""How a step goes with given choices: the executor's dispatch played through with predicted costs.

As in `runtime.executor`, calls are dispatched in the workload's order. A device does what it is given one after the
other, so a call starts when its inputs are there and all of its devices are free; calls on disjoint devices overlap.
The host waits for a generate call before it dispatches more. A call that is not at its role's home has a copy of the
parameters made first, which keeps both sides busy; parameters in host memory are fetched for every call. A step begins
when the training calls of the one before are done, as `runtime.session` waits for their metrics: the step's seconds are
those from its start to the end of its last call.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.workload import CallWork, RoleWork, Workload
from realjax.core.layout import number_ranges

# What programs may take of a device's memory, as runs set it (`launch/settings.py`): CUDA and NCCL need the rest.
USABLE_SHARE = 0.9
GIB = 2**30
HOST = -1  # the layout of what waits in host memory
HEAD = ("call", "devices", "strategy", "parameters", "moved GiB", "move s", "start s", "seconds", "peak GiB")


@dataclass(frozen=True, kw_only=True)
class Move:
    """Parameters on their way to a call."""

    seconds: float
    bytes: float


class Costs(Protocol):
    """What calls and moves cost. Equal devices are alike: a part of a node costs the same wherever it lies."""

    def call_seconds(self, work: CallWork, choice: Choice) -> float:
        """Of a step, parameters in place."""
        ...

    def home_bytes(self, role: RoleWork, work: CallWork, choice: Choice) -> float:
        """That stay on each device of a role's home, which is the layout of the call `work`."""
        ...

    def call_bytes(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool) -> float:
        """On each device while the call runs, beside what is at home; a copy of the parameters where it has one."""
        ...

    def move(self, role: RoleWork, source: Choice, destination: Choice) -> Move:
        """From the home layout to a call's."""
        ...

    def fetch(self, role: RoleWork, destination: Choice) -> Move:
        """From host memory to a call's layout."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Priced:
    """A choice for a call with all costs that are its own. `mask` has a bit for each device."""

    choice: Choice
    mask: int
    layout: int  # two that are equal are one layout
    seconds: float
    home_bytes: float  # if it is the role's home call
    bytes_at_home: float
    bytes_away: float


Plan = Sequence[Priced]  # one for each call, in the workload's order


class Score(NamedTuple):
    """How good a plan is, the smaller the better: bytes that do not fit, summed over the calls, come first."""

    excess_bytes: float
    seconds: float


class Task(NamedTuple):
    """What devices are busy with: a call, or its parameters on their way."""

    call: int
    what: Literal["move", "fetch", "call"]
    mask: int
    seconds: float
    bytes: float
    after: tuple[int, ...]  # calls


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of the timeline, in seconds from the step's start."""

    name: str  # of the call
    what: Literal["move", "fetch", "call"]
    devices: tuple[int, ...]
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class CallPrediction:
    """A call of a step as predicted; times in seconds from the step's start."""

    name: str
    role: str
    choice: Choice
    source: Literal["home", "moved", "host"]  # where its parameters come from
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
    usable_bytes: float  # of a device
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


def simulate(workload: Workload, choices: Mapping[str, Choice], costs: Costs, cluster: Cluster) -> Prediction:
    """Returns how a step goes when each call runs as chosen. Raises ValueError for a call without a choice."""
    if missing := [call.name for call in workload.calls if call.name not in choices]:
        raise ValueError(f"simulate: no choice for {', '.join(missing)}; give one for every call")
    simulator = Simulator(workload, costs, cluster)
    return simulator.predict([simulator.price(call, choices[call.name]) for call in workload.calls])


class Simulator:
    """Plays plans of one workload through. Moves between two layouts are priced once."""

    def __init__(self, workload: Workload, costs: Costs, cluster: Cluster) -> None:
        """Raises ValueError for a trained role that is to be offloaded."""
        self.workload, self.costs, self.cluster = workload, costs, cluster
        self.calls = workload.calls
        self.usable_bytes = cluster.memory_bytes * USABLE_SHARE
        self.by_role = {name: [i for i, call in enumerate(self.calls) if call.role == name] for name in workload.roles}
        numbers = {call.name: i for i, call in enumerate(self.calls)}
        self.homes = [numbers[workload.home_call(call.role).name] for call in self.calls]
        self.after = [tuple(numbers[name] for name in call.after) for call in self.calls]
        # The parameters that a call reads are those that the role's training call has made, where it came before.
        self.trained_before = [
            (home,) if home < i and self.calls[home].kind == "train" else () for i, home in enumerate(self.homes)
        ]
        self._layouts: dict[tuple, int] = {}
        self._moves: dict[tuple[str, int, int], Move] = {}  # by role, source and destination
        for role in workload.roles.values():
            if role.is_trained and role.offload:
                raise ValueError(
                    f"{role.name}.offload: a role that is trained stays on its devices, where its masters and moments "
                    "are updated; set it to False or null"
                )

    def price(self, work: CallWork, choice: Choice) -> Priced:
        """Returns a choice with its costs."""
        role = self.workload.roles[work.role]
        is_home = self.workload.home_call(work.role) is work
        return Priced(
            choice=choice,
            mask=make_mask(choice.devices),
            layout=self.number_layout(choice),
            seconds=self.costs.call_seconds(work, choice),
            home_bytes=self.costs.home_bytes(role, work, choice) if is_home else 0.0,
            bytes_at_home=self.costs.call_bytes(role, work, choice, at_home=True),
            bytes_away=self.costs.call_bytes(role, work, choice, at_home=False),
        )

    def number_layout(self, choice: Choice) -> int:
        """Returns the number of a choice's layout: the same for equal strategies on equal devices."""
        return self._layouts.setdefault((choice.strategy, choice.devices), len(self._layouts))

    def score(self, plan: Plan) -> Score:
        """Returns how good a plan is."""
        offloaded = self.find_offloaded(plan)
        excess = sum(max(0.0, peak - self.usable_bytes) for peak in self.find_peaks(plan, offloaded))
        return Score(excess, max(end for _, end in play(self.list_tasks(plan, offloaded), self.calls)))

    def predict(self, plan: Plan) -> Prediction:
        """Returns how a step goes."""
        offloaded = self.find_offloaded(plan)
        tasks, peaks = self.list_tasks(plan, offloaded), self.find_peaks(plan, offloaded)
        times = play(tasks, self.calls)
        sources: dict[str, Literal["moved", "host"]] = {"move": "moved", "fetch": "host"}
        moves = {task.call: task for task in tasks if task.what != "call"}
        calls, spans = [], []
        for task, (start, end) in zip(tasks, times, strict=True):
            work, choice, move = self.calls[task.call], plan[task.call].choice, moves.get(task.call)
            spans.append(Span(name=work.name, what=task.what, devices=_list_bits(task.mask), start=start, end=end))
            if task.what == "call":
                one = CallPrediction(
                    name=work.name,
                    role=work.role,
                    choice=choice,
                    source=sources[move.what] if move else "home",
                    start=start,
                    end=end,
                    move_seconds=move.seconds if move else 0.0,
                    moved_bytes=move.bytes if move else 0.0,
                    peak_bytes=peaks[task.call],
                )
                calls.append(one)
        return Prediction(
            calls=tuple(calls),
            spans=tuple(spans),
            seconds=max(end for _, end in times),
            device_bytes=self._list_device_bytes(plan, offloaded),
            usable_bytes=self.usable_bytes,
            offloaded=offloaded,
        )

    def find_offloaded(self, plan: Plan) -> frozenset[str]:
        """Returns the roles whose parameters wait in host memory, by the rule of `allocate.is_offloaded`."""
        found = []
        for name, role in self.workload.roles.items():
            if role.offload is not None or role.is_trained:
                is_offloaded = bool(role.offload)
            else:
                own, others = 0, 0
                for call, priced in zip(self.calls, plan, strict=True):
                    if call.role == name:
                        own |= priced.mask
                    else:
                        others |= priced.mask
                is_offloaded = bool(own & others)
            if is_offloaded:
                found.append(name)
        return frozenset(found)

    def is_at_home(self, plan: Plan, call: int) -> bool:
        """Returns whether a call runs in the layout in which its role's parameters stay."""
        return plan[call].layout == plan[self.homes[call]].layout

    def list_tasks(self, plan: Plan, offloaded: frozenset[str]) -> list[Task]:
        """Returns what the devices do in a step, in the order of dispatch."""
        tasks, stretches = [], self.find_stretches(plan)
        for i, (work, own) in enumerate(zip(self.calls, plan, strict=True)):
            if work.role in offloaded:
                move = self.price_fetch(work.role, own)
                tasks.append(Task(i, "fetch", own.mask, move.seconds, move.bytes, ()))
            elif not self.is_at_home(plan, i):
                home = plan[self.homes[i]]
                move = self.price_move(work.role, home, own)
                tasks.append(
                    Task(i, "move", own.mask | home.mask, move.seconds, move.bytes, self.trained_before[i])
                )  # fmt: skip
            after = self.after[i] + self.trained_before[i]
            tasks.append(Task(i, "call", own.mask, own.seconds * stretches[i], 0.0, after))
        return tasks

    def find_stretches(self, plan: Plan) -> list[float]:
        """Returns, of each call, how many times its own layers a role's calls have together.

        A role has one number of empty layers, which makes the stages of all its calls equal
        (`allocate.count_empty_layers`).
        """
        stretches = [1.0] * len(self.calls)
        for numbers in self.by_role.values():
            num_layers = self.calls[numbers[0]].model.num_layers
            stages = {plan[i].choice.strategy.pp for i in numbers}
            if len(stages) > 1 and any(num_layers % pp for pp in stages):
                stacked = _round_up(num_layers, math.lcm(*stages))
                for i in numbers:
                    stretches[i] = stacked / _round_up(num_layers, plan[i].choice.strategy.pp)
        return stretches

    def find_peaks(self, plan: Plan, offloaded: frozenset[str]) -> list[float]:
        """Returns the bytes on the fullest device of each call while it runs: all homes there, and the call."""
        regions, stretches = [(-1, 0.0)], self.find_stretches(plan)
        for mask, num_bytes in self._list_homes(plan, offloaded, stretches):
            inside = [(region & mask, held + num_bytes) for region, held in regions if region & mask]
            regions = inside + [(region & ~mask, held) for region, held in regions if region & ~mask]
        return [
            self._call_bytes(plan, i, offloaded) * stretches[i]
            + max(held for region, held in regions if region & priced.mask)
            for i, priced in enumerate(plan)
        ]

    def price_move(self, role: str, source: Priced, destination: Priced) -> Move:
        """Returns what it costs to bring a role's parameters from home to a call."""
        key = (role, source.layout, destination.layout)
        if key not in self._moves:
            self._moves[key] = self.costs.move(self.workload.roles[role], source.choice, destination.choice)
        return self._moves[key]

    def price_fetch(self, role: str, destination: Priced) -> Move:
        """Returns what it costs to bring a role's parameters from host memory to a call."""
        key = (role, HOST, destination.layout)
        if key not in self._moves:
            self._moves[key] = self.costs.fetch(self.workload.roles[role], destination.choice)
        return self._moves[key]

    def _list_homes(self, plan: Plan, offloaded: frozenset[str], stretches: list[float]) -> list[tuple[int, float]]:
        homes = {call.role: home for call, home in zip(self.calls, self.homes, strict=True)}
        return [
            (plan[home].mask, plan[home].home_bytes * stretches[home])
            for role, home in homes.items()
            if role not in offloaded
        ]

    def _call_bytes(self, plan: Plan, call: int, offloaded: frozenset[str]) -> float:
        at_home = self.calls[call].role not in offloaded and self.is_at_home(plan, call)
        return plan[call].bytes_at_home if at_home else plan[call].bytes_away

    def _list_device_bytes(self, plan: Plan, offloaded: frozenset[str]) -> tuple[float, ...]:
        held, most = [0.0] * self.cluster.num_devices, [0.0] * self.cluster.num_devices
        stretches = self.find_stretches(plan)
        for mask, num_bytes in self._list_homes(plan, offloaded, stretches):
            for device in _list_bits(mask):
                held[device] += num_bytes
        for i, priced in enumerate(plan):
            for device in priced.choice.devices:
                most[device] = max(most[device], self._call_bytes(plan, i, offloaded) * stretches[i])
        return tuple(home + call for home, call in zip(held, most, strict=True))


def play(tasks: Sequence[Task], calls: Sequence[CallWork]) -> list[tuple[float, float]]:
    """Returns when each task starts and ends, given in the order of dispatch."""
    times, host = list[tuple[float, float]](), 0.0
    call_ends = [0.0] * len(calls)
    for number, task in enumerate(tasks):
        start = max([host, *(call_ends[i] for i in task.after)])
        for before, (_, end) in zip(tasks[:number], times, strict=True):
            if end > start and before.mask & task.mask:
                start = end
        end = start + task.seconds
        times.append((start, end))
        if task.what == "call":
            call_ends[task.call] = end
            if calls[task.call].kind == "generate":
                host = end
    return times


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def make_mask(devices: Sequence[int]) -> int:
    """Returns an integer with a bit for each device."""
    return sum(1 << device for device in devices)


def _list_bits(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)
