"""What compiling a run's programs has shown: memory, traffic and work of each, as data and as a table."""

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.stages import Compiled, Lowered

from realjax.allocation.simulate import USABLE_SHARE
from realjax.aot import hlo
from realjax.aot.lower import Program
from realjax.aot.targets import Target
from realjax.core.layout import ParallelStrategy

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device, of those of a program the fullest, while it runs. Outputs written over arguments take none.

    `held` is what lies there besides, by name: roles' states that the program is not given, and copies of them.
    """

    arguments: int
    outputs: int
    temporaries: int
    held: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + sum(self.held.values())


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind along the same mesh axes: instructions run and their bytes on a device, in a step (or an
    evaluation).

    `wire_bytes` is what a device sends, when each group is a ring.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    wire_bytes: float
    times: int


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """A compiled program; see `aot.lower.Program` for how often it runs, and `aot.hlo.Reading` for what is counted."""

    call: str
    name: str
    role: str
    options: str  # the name of the options that say how the call runs
    strategy: ParallelStrategy
    devices: str
    num_params: int
    shape: str
    num_mbs: int
    runs: int
    is_evaluation: bool
    memory: Memory
    traffic: tuple[Traffic, ...]
    matmul_flops: int  # of a device, in a step or an evaluation
    opaque_calls: Mapping[str, int]
    compile_seconds: float

    @property
    def title(self) -> str:
        return self.call if self.name in ("train", "inference", "evaluation") else f"{self.call}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """All programs of a run, compiled for a target. `layers`, by role, are given where not all of a model's were."""

    experiment: str
    target: str
    memory_bytes: int | None  # of a device
    num_hosts: int
    per_host: int
    programs: tuple[ProgramReport, ...]
    layers: Mapping[str, tuple[int, int]]  # compiled, and of the model

    @property
    def usable_bytes(self) -> int | None:
        return None if self.memory_bytes is None else int(self.memory_bytes * USABLE_SHARE)

    @property
    def fullest(self) -> ProgramReport:
        return max(self.programs, key=lambda program: program.memory.total)

    @property
    def margin_bytes(self) -> int | None:
        """What is left of the usable memory beside the fullest program, negative where it does not fit."""
        return None if self.usable_bytes is None else self.usable_bytes - self.fullest.memory.total

    def to_json(self) -> str:
        """Returns all of it as a JSON object, with the totals that follow."""
        tree: dict[str, Any] = dataclasses.asdict(self)
        for program, entry in zip(self.programs, tree["programs"], strict=True):
            entry["memory"]["total"] = program.memory.total
            entry["fits"] = None if self.usable_bytes is None else program.memory.total <= self.usable_bytes
        tree |= {"usable_bytes": self.usable_bytes, "fullest": self.fullest.title, "margin_bytes": self.margin_bytes}
        return json.dumps(tree, indent=1)


class Compiler:
    """Compiles for a target, each program once, and knows how long that took."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._done: dict[int, tuple[Lowered, Compiled, float]] = {}

    def compile(self, lowered: Lowered) -> Compiled:
        return self._get(lowered)[1]

    def report(self, program: Program) -> ProgramReport:
        """Returns what the compiled program shows, and lets go of it."""
        _, compiled, seconds = self._get(program.lowered)
        del self._done[id(program.lowered)]
        text, sizes = compiled.as_text(), compiled.memory_analysis()
        assert text is not None and sizes is not None, "XLA tells what it has compiled, on every platform"
        reading = hlo.read(text)
        return ProgramReport(
            call=program.call,
            name=program.name,
            role=program.role,
            options=program.options,
            strategy=program.layout.strategy,
            devices=program.layout.device_names,
            num_params=program.num_params,
            shape=program.shape,
            num_mbs=program.num_mbs,
            runs=program.runs,
            is_evaluation=program.is_evaluation,
            memory=Memory(
                arguments=sizes.argument_size_in_bytes,
                outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
                temporaries=sizes.temp_size_in_bytes,
                held=program.held,
            ),
            traffic=sum_traffic(reading.collectives, program),
            matmul_flops=(reading.matmul_flops - reading.open_flops) * program.runs
            + reading.open_flops * (program.turns or program.runs),
            opaque_calls=reading.opaque_calls,
            compile_seconds=seconds,
        )

    def _get(self, lowered: Lowered) -> tuple[Lowered, Compiled, float]:
        if id(lowered) not in self._done:
            start = time.perf_counter()
            compiled = self.target.compile(lowered)
            self._done[id(lowered)] = lowered, compiled, time.perf_counter() - start
        return self._done[id(lowered)]


def sum_traffic(collectives: Iterable[hlo.Collective], program: Program) -> tuple[Traffic, ...]:
    """Returns a program's collectives of a step, summed by kind, axes and dtype, the most bytes first."""
    runs = lambda one: program.turns if one.is_open and program.turns else program.runs
    groups: dict[tuple[str, tuple[str, ...], str], list[hlo.Collective]] = defaultdict(list)
    for one in collectives:
        groups[one.kind, one.axes(program.layout), one.dtype].append(one)
    sums = [
        Traffic(
            kind=kind,
            axes=axes,
            dtype=dtype,
            bytes=sum(one.total_bytes * runs(one) for one in group),
            wire_bytes=sum(one.wire_bytes * runs(one) for one in group),
            times=sum(one.times * runs(one) for one in group),
        )
        for (kind, axes, dtype), group in groups.items()
    ]
    return tuple(sorted(sums, key=lambda traffic: -traffic.bytes))


def describe(report: RunReport) -> str:
    """Returns the report as tables: memory and work of each program, then its collectives."""
    rows = [_memory_row(program, report.usable_bytes) for program in report.programs]
    head = ["call", "layout", "shape", "mbs", "runs", *["arguments", "outputs", "temporaries", "held", "total", "fits"]]
    lines = [f"Memory of a device in GiB, and matrix products in TFLOP a device and step ({report.target})"]
    lines += _table([*head, "TFLOP", "compiled in"], rows)
    lines += ["", "Held besides, on the fullest device (GiB)"]
    for program in report.programs:
        held = ", ".join(f"{what} {size / GIB:.2f}" for what, size in program.memory.held.items())
        lines += [f"  {program.title}: {held}"] if held else []
    lines += ["", "Collectives of a step: instructions run, and GB of a device"]
    rows = [
        [program.title, traffic.kind, "+".join(traffic.axes) or "-", traffic.dtype]
        + [str(traffic.times), f"{traffic.bytes / 1e9:.3f}"]
        for program in report.programs
        for traffic in program.traffic
    ]
    lines += _table(["call", "kind", "axes", "dtype", "times", "GB"], rows, num_left=4)
    return "\n".join([*lines, "", *_notes(report)])


def _notes(report: RunReport) -> list[str]:
    notes = [
        f"Only {compiled} of {whole} layers of {role} were compiled, and all figures are those of {compiled} layers."
        for role, (compiled, whole) in report.layers.items()
    ]
    if any(program.is_evaluation for program in report.programs):
        notes.append("Programs with (e) run in an evaluation, and their figures are of one, not of a step.")
    calls = sorted({name for program in report.programs for name in program.opaque_calls})
    if calls:
        notes.append(f"Not counted are the products inside {', '.join(calls)}.")
    return notes


def _memory_row(program: ProgramReport, usable: int | None) -> list[str]:
    memory = program.memory
    parts = (memory.arguments, memory.outputs, memory.temporaries, sum(memory.held.values()), memory.total)
    fits = "-" if usable is None else "yes" if memory.total <= usable else "NO"
    return [
        program.title + (" (e)" if program.is_evaluation else ""),
        f"{program.strategy} on {program.devices}",
        program.shape,
        str(program.num_mbs),
        str(program.runs),
        *(f"{part / GIB:.2f}" for part in parts),
        fits,
        f"{program.matmul_flops / 1e12:.1f}",
        f"{program.compile_seconds:.0f} s",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 3) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    show = lambda row: "  ".join(
        cell.ljust(width) if i < num_left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
    )
    return [f"  {show(row).rstrip()}" for row in (head, *rows)]
