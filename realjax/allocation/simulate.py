"""How a step goes with given choices: the executor's dispatch played through with predicted costs.

As in `runtime.executor`, calls are dispatched in the workload's order. A device does what it is given one after the
other, so a call starts when its inputs are there and all of its devices are free; calls on disjoint devices overlap.
The host waits for a generate call before it dispatches more. A call that is not at its role's home has a copy of the
parameters made first, which keeps both sides busy; parameters in host memory are fetched for every call. A call that
works for the next step has its copy made before all else, and waits for no training. A step begins
when the training calls of the one before are done, as `runtime.session` waits for their metrics: the step's seconds are
those from its start to the end of its last call.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.costing import FREE, Costs, Move
from realjax.allocation.prediction import GIB, CallPrediction, Prediction, Source, Span, What
from realjax.allocation.workload import CallWork, Workload

# What programs may take of a device's memory, as runs set it (`launch/settings.py`): CUDA and NCCL need the rest.
USABLE_SHARE = 0.9
HOST = -1  # the layout of what waits in host memory


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Priced:
    """A choice for a call with all costs that are its own. `mask` has a bit for each device."""

    choice: Choice
    mask: int
    layout: int  # two that are equal are one layout
    has_empty_layers: bool
    row_multiple: int  # of the rows that it reads
    seconds: float
    home_bytes: float  # if it is the role's home call
    bytes_at_home: float
    bytes_away: float


Plan = Sequence[Priced]  # one for each call, in the workload's order
OpenPlan = Sequence[Priced | None]  # None: not decided yet


class Score(NamedTuple):
    """How good a plan is, the smaller the better: bytes that do not fit, summed over the calls, come first."""

    excess_bytes: float
    seconds: float


class Task(NamedTuple):
    """What devices are busy with: a call, or its parameters on their way."""

    call: int
    what: What
    mask: int
    seconds: float
    bytes: float
    after: tuple[int, ...]  # calls


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
        self.usable_bytes = cluster.memory_bytes * USABLE_SHARE / (1 + costs.margin)
        self.by_role = {
            role: [i for i, call in enumerate(self.calls) if call.role == role]
            for role in dict.fromkeys(call.role for call in self.calls)
        }
        numbers = {call.name: i for i, call in enumerate(self.calls)}
        self.homes = [numbers[workload.home_call(call.role).name] for call in self.calls]
        self.after = [tuple(numbers[name] for name in call.after) for call in self.calls]
        # The parameters that a call reads are those that the role's training call has made, where it came before.
        self.trained_before = [
            (home,) if home < i and self.calls[home].kind == "train" and not self.calls[i].is_ahead else ()
            for i, home in enumerate(self.homes)
        ]
        # Calls that read the same rows: those behind a generate call, but for updates that get rows of their own.
        has_rollouts = any(call.kind == "generate" for call in self.calls)
        self.readers = [i for i, call in enumerate(self.calls) if not has_rollouts or call.kind != "train"]
        self._num_tokens: dict[tuple[int, int], float] = {}  # of all rows, by call and what the rows are a multiple of
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
        is_home = self.workload.home_call(work.role).name == work.name
        is_bounded = work.fixed.micro_batches is not None and work.fixed.micro_batches.max_tokens is not None
        return Priced(
            choice=choice,
            mask=make_mask(choice.devices),
            layout=self.number_layout(choice),
            has_empty_layers=work.model.num_layers % choice.strategy.pp > 0,
            row_multiple=choice.strategy.row_multiple * (1 if is_bounded else choice.num_mbs),
            seconds=self.costs.call_seconds(work, choice),
            home_bytes=self.costs.home_bytes(role, work, choice) if is_home else 0.0,
            bytes_at_home=self.costs.call_bytes(role, work, choice, at_home=True),
            bytes_away=self.costs.call_bytes(role, work, choice, at_home=False),
        )

    def number_layout(self, choice: Choice) -> int:
        """Returns the number of a choice's layout: the same for equal strategies on equal devices."""
        return self._layouts.setdefault((choice.strategy, choice.devices), len(self._layouts))

    def score(self, plan: Plan, limit: Score | None = None) -> Score:
        """Returns how good a plan is; of one that is no better than `limit`, only that it is not."""
        offloaded = self.find_offloaded(plan)
        if limit is not None and not limit.excess_bytes:
            # Moves that nobody has asked for yet are not priced for plans that are too slow without them.
            seconds = self._play(self.list_tasks(plan, offloaded, prices_moves=False))
            if seconds >= limit.seconds:
                return Score(0.0, seconds)
        seconds = self._play(self.list_tasks(plan, offloaded))
        excess = sum([max(0.0, peak - self.usable_bytes) for peak in self.find_peaks(plan, offloaded)])
        return Score(excess, seconds)

    def _play(self, tasks: Sequence[Task]) -> float:
        return max([end for _, end in play(tasks, self.calls, overlaps=self.cluster.overlaps)])

    def predict(self, plan: Plan) -> Prediction:
        """Returns how a step goes."""
        offloaded = self.find_offloaded(plan)
        tasks, peaks = self.list_tasks(plan, offloaded), self.find_peaks(plan, offloaded)
        times = play(tasks, self.calls, overlaps=self.cluster.overlaps)
        sources: dict[str, Source] = {"move": "moved", "fetch": "host"}
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

    def bound(self, plan: OpenPlan, least_seconds: Sequence[float]) -> Score:
        """Returns what no plan can be better than that completes this one.

        Calls that are not decided are on no device, and take the least that they can. Roles of which it is not sure
        yet whether they are offloaded are neither at home nor anywhere else.
        """
        offloaded = self.find_offloaded(plan)
        unsure = frozenset(
            name
            for name, role in self.workload.roles.items()
            if not role.is_trained and role.offload is None and name not in offloaded
        )
        peaks = self.find_peaks(plan, offloaded, unsure)
        excess = sum(max(0.0, peak - self.usable_bytes) for peak in peaks)
        times = play(
            self.list_tasks(plan, offloaded, unsure, least_seconds), self.calls, overlaps=self.cluster.overlaps
        )
        return Score(excess, max(end for _, end in times))

    def find_offloaded(self, plan: OpenPlan) -> frozenset[str]:
        """Returns the roles whose parameters wait in host memory, by the rule of `allocate.is_offloaded`."""
        return frozenset(name for name in self.workload.roles if self._is_offloaded(name, plan))

    def _is_offloaded(self, name: str, plan: OpenPlan) -> bool:
        role = self.workload.roles[name]
        if role.offload is not None or role.is_trained:
            return bool(role.offload)
        own = others = 0
        for call, priced in zip(self.calls, plan, strict=True):
            mask = priced.mask if priced else 0
            own, others = (own | mask, others) if call.role == name else (own, others | mask)
        return bool(own & others)

    def is_at_home(self, plan: OpenPlan, call: int) -> bool:
        """Returns whether a call runs in the layout in which its role's parameters stay, as far as that is known."""
        own, home = plan[call], plan[self.homes[call]]
        return own is None or home is None or own.layout == home.layout

    def list_tasks(
        self,
        plan: OpenPlan,
        offloaded: frozenset[str],
        unsure: frozenset[str] = frozenset(),
        least_seconds: Sequence[float] = (),
        prices_moves: bool = True,
    ) -> list[Task]:
        """Returns what the devices do in a step, in the order of dispatch. For an open plan see `bound`.

        Without `prices_moves`, those that have no price yet take no time.
        """
        first, tasks, stretches = list[Task](), list[Task](), self.find_stretches(plan)
        if not least_seconds:
            stretches = [a * b for a, b in zip(stretches, self.find_row_stretches(plan), strict=True)]
        for i, (work, own) in enumerate(zip(self.calls, plan, strict=True)):
            after = self.after[i] + self.trained_before[i]
            if own is None:
                tasks.append(Task(i, "call", 0, least_seconds[i], 0.0, after))
                continue
            home = plan[self.homes[i]]
            if work.role in offloaded:
                move = self.price_fetch(work.role, own)
                tasks.append(Task(i, "fetch", own.mask, move.seconds, move.bytes, ()))
            elif home is not None and home.layout != own.layout and work.role not in unsure:
                known = self._moves.get((work.role, home.layout, own.layout), FREE)
                move = self.price_move(work.role, home, own) if prices_moves else known
                mask = own.mask | home.mask
                moves = first if work.is_ahead else tasks
                moves.append(Task(i, "move", mask, move.seconds, move.bytes, self.trained_before[i]))
            tasks.append(Task(i, "call", own.mask, own.seconds * stretches[i], 0.0, after))
        return first + tasks

    def find_stretches(self, plan: OpenPlan) -> list[float]:
        """Returns, of each call, how many times its own layers a role's calls have together.

        A role has one number of empty layers, which makes the stages of all its calls equal
        (`allocate.count_empty_layers`).
        """
        stretches = [1.0] * len(self.calls)
        if not any(priced.has_empty_layers for priced in plan if priced):
            return stretches
        for numbers in self.by_role.values():
            num_layers = self.calls[numbers[0]].model.num_layers
            stages = {i: one.choice.strategy.pp for i in numbers if (one := plan[i]) is not None}
            stacked = _round_up(num_layers, math.lcm(*stages.values()))
            for i, pp in stages.items():
                stretches[i] = stacked / _round_up(num_layers, pp)
        return stretches

    def find_row_stretches(self, plan: OpenPlan) -> list[float]:
        """Returns, of each call, how many times the tokens of its own rows there are in those that it shares.

        The rows of a batch divide over all calls that read it (`allocation.shapes`), some of them empty for that.
        """
        stretches = [1.0] * len(self.calls)
        multiples = {i: one.row_multiple for i in self.readers if (one := plan[i]) is not None}
        shared = math.lcm(*multiples.values())
        for i, own in multiples.items():
            if own != shared and self.calls[i].kind != "generate":
                stretches[i] = max(1.0, self._count_tokens(i, shared) / self._count_tokens(i, own))
        return stretches

    def _count_tokens(self, call: int, multiple: int) -> float:
        if (call, multiple) not in self._num_tokens:
            num_rows, row_len = self.calls[call].pack_fn(multiple)
            self._num_tokens[call, multiple] = num_rows * row_len
        return self._num_tokens[call, multiple]

    def find_peaks(
        self, plan: OpenPlan, offloaded: frozenset[str], unsure: frozenset[str] = frozenset()
    ) -> list[float]:
        """Returns the bytes on the fullest device of each call while it runs: all homes there, and the call.

        For an open plan see `bound`.
        """
        regions, stretches = [(-1, 0.0)], self.find_stretches(plan)
        for mask, num_bytes in self._list_homes(plan, offloaded | unsure, stretches):
            inside = [(region & mask, held + num_bytes) for region, held in regions if region & mask]
            regions = inside + [(region & ~mask, held) for region, held in regions if region & ~mask]
        peaks = [0.0] * len(plan)
        for i, priced in enumerate(plan):
            if priced is not None:
                held = max(held for region, held in regions if region & priced.mask)
                peaks[i] = held + self._call_bytes(plan, i, offloaded, unsure) * stretches[i]
        return peaks

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

    def explain_misfit(self, plan: Plan) -> str:
        """Returns which call of a plan lacks most memory, how much, and what to change."""
        offloaded = self.find_offloaded(plan)
        peaks = self.find_peaks(plan, offloaded)
        worst = max(range(len(plan)), key=peaks.__getitem__)
        at_home = self.calls[worst].role not in offloaded and self.is_at_home(plan, worst)
        return self.explain_excess(self.calls[worst], plan[worst].choice, peaks[worst], at_home=at_home)

    def explain_excess(self, work: CallWork, choice: Choice, needed: float, *, at_home: bool) -> str:
        """Returns by how much a call as chosen does not fit, and what to change."""
        excess, role = needed - self.usable_bytes, self.workload.roles[work.role]
        return (
            f"{work.name}: as {choice} on {len(choice.devices)} devices it needs {needed / GIB:.1f} GiB on each, "
            f"{excess / GIB:.1f} more than can be planned with of {self.cluster.name}'s "
            f"{self.cluster.memory_bytes / GIB:.1f}; the smallest change that fits: "
            + self.costs.advise(role, work, choice, at_home=at_home, excess_bytes=excess)
        )

    def _list_homes(self, plan: OpenPlan, elsewhere: frozenset[str], stretches: list[float]) -> list[tuple[int, float]]:
        return [
            (priced.mask, priced.home_bytes * stretches[home])
            for role, home in ((role, self.homes[numbers[0]]) for role, numbers in self.by_role.items())
            if role not in elsewhere and (priced := plan[home]) is not None
        ]

    def _call_bytes(
        self, plan: OpenPlan, call: int, offloaded: frozenset[str], unsure: frozenset[str] = frozenset()
    ) -> float:
        priced, role = plan[call], self.calls[call].role
        assert priced is not None
        if role in unsure or plan[self.homes[call]] is None:
            return min(priced.bytes_at_home, priced.bytes_away)
        keeps_own = self.calls[call].is_ahead and self.workload.roles[role].is_trained
        at_home = role not in offloaded and self.is_at_home(plan, call) and not keeps_own
        return priced.bytes_at_home if at_home else priced.bytes_away

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


def play(tasks: Sequence[Task], calls: Sequence[CallWork], *, overlaps: bool = True) -> list[tuple[float, float]]:
    """Returns when each task starts and ends, given in the order of dispatch; see `Cluster.overlaps`."""
    times, host = list[tuple[float, float]](), 0.0
    masks, ends, call_ends = list[int](), list[float](), [0.0] * len(calls)
    for task in tasks:
        mask, start = task.mask, host
        for i in task.after:
            if call_ends[i] > start:
                start = call_ends[i]
        for before, end in zip(masks, ends):
            if end > start and (before & mask or not overlaps):
                start = end
        end = start + task.seconds
        times.append((start, end))
        masks.append(mask)
        ends.append(end)
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
