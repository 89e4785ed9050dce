"""What to change of a run whose programs do not fit: options, with the memory that each of them saves."""

from collections.abc import Iterator
from dataclasses import dataclass

from realjax.aot.report import GIB, ProgramReport, RunReport
from realjax.dataflow.run import RunSpec

MOST_MICRO_BATCHES = 2**16


@dataclass(frozen=True, kw_only=True)
class Advice:
    """An option to set for a call, and the bytes a device that it saves, at a guess."""

    text: str
    saves: int

    def __str__(self) -> str:
        return f"{self.text} (saves about {self.saves / GIB:.1f} GiB)"


def verdict(report: RunReport, spec: RunSpec) -> str:
    """Returns whether the run fits the target, with what margin; else what to change for each call that does not."""
    fullest, usable = report.fullest, report.usable_bytes
    if usable is None or report.memory_bytes is None:
        return f"The fullest program is {fullest.title} with {fullest.memory.total / GIB:.1f} GiB a device."
    room = f"{usable / GIB:.1f} GiB that programs may take of a device's {report.memory_bytes / GIB:.1f}"
    over = [program for program in report.programs if program.memory.total > usable]
    if not over:
        left = (usable - fullest.memory.total) / GIB
        return (
            f"It fits: the fullest program, {fullest.title}, takes {fullest.memory.total / GIB:.1f} GiB of the {room}; "
            f"{left:.1f} GiB are left."
        )
    lines = ["It does not fit."]
    for program in over:
        excess = program.memory.total - usable
        lines.append(f"{program.title} takes {program.memory.total / GIB:.1f} GiB of the {room}. Change:")
        lines += [f"  {advice}" for advice in choose(program, spec, excess)]
    return "\n".join(lines)


def choose(program: ProgramReport, spec: RunSpec, excess: int) -> list[Advice]:
    """Returns what saves `excess` bytes or more of a program together, the cheapest first; all there is if that does
    not do.
    """
    chosen: list[Advice] = []
    for advice in _list_advice(program, spec, excess):
        chosen.append(advice)
        if sum(one.saves for one in chosen) >= excess:
            return chosen
    more = "more devices, or larger parallel sizes of this call and those beside it: nothing else saves as much"
    return [*chosen, Advice(text=more, saves=excess - sum(one.saves for one in chosen))]


def _list_advice(program: ProgramReport, spec: RunSpec, excess: int) -> Iterator[Advice]:
    """Yields what could be changed, from what costs no time to what costs most."""
    memory, role = program.memory, spec.roles[program.role]
    for what, size in memory.held.items():
        owner, _, part = what.partition(": ")
        if part == "parameters":
            yield Advice(text=f"{owner}.offload=True", saves=size)
            excess -= size
    option = "model" if program.role == "default" else program.role
    strategy, is_train = program.strategy, program.name == "train"
    if is_train and not role.compute.remat:
        yield Advice(text=f"{option}.gradient_checkpointing=True", saves=memory.temporaries // 2)
        return
    if program.name in ("train", "inference", "evaluation"):
        yield from _more_micro_batches(program, excess)
    if program.name in ("admit", "decode"):
        yield Advice(text="fewer answers at once (gen.num_slots): half as many", saves=memory.arguments // 4)
    states = sum(size for what, size in memory.held.items() if what.endswith(("masters", "moments")))
    own = memory.arguments if is_train else states
    if strategy.dp > 1 and strategy.zero_stage == 0:
        yield Advice(text=f"{option}.zero_stage=2", saves=own * 2 * (strategy.dp - 1) // (3 * strategy.dp))
    if strategy.dp > 1 and strategy.zero_stage < 3 and is_train:
        share = 1 if strategy.zero_stage else 3
        yield Advice(text=f"{option}.zero_stage=3", saves=own * (strategy.dp - 1) // (share * strategy.dp) // 2)


def _more_micro_batches(program: ProgramReport, excess: int) -> Iterator[Advice]:
    """Yields the fewest micro-batches that make temporaries small enough, if activations shrink as micro-batches do."""
    rows = int(program.shape.split()[0]) // program.strategy.dp
    # Float32 gradients and a copy of the parameters in the compute dtype are as large for any micro-batch.
    fixed = program.num_params * (6 if program.name == "train" else 2)
    activations = max(0, program.memory.temporaries - fixed)
    counts = [n for n in range(program.num_mbs + 1, rows + 1) if rows % n == 0]
    saved = lambda count: activations - activations * program.num_mbs // count
    if counts:
        count = next((n for n in counts if saved(n) >= excess), counts[-1])
        yield Advice(text=f"{program.options}.n_mbs={count}", saves=saved(count))
