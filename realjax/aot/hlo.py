"""What a compiled program sends between devices and how much it multiplies, read from XLA's text of it.

The text is that of `jax.stages.Compiled.as_text()`: after all passes of the backend, as a device runs it. What is in a
loop counts as often as the loop turns, see `turns.py`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from realjax.aot.instructions import Instruction, Shape, parse, read_numbers
from realjax.aot.turns import Counter, count_turns, find_counter
from realjax.core.layout import Layout

# Libraries' kernels that multiply two matrices, as XLA calls them.
MATMUL_TARGETS = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")

_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUPS = re.compile(
    r"\b(?:replica_groups|source_target_pairs)="
    r"(\{\{.*?\}\}|\{\}|mesh\[.*?\](?:, device_ids=\(.*?\))? \{.*?\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collective:
    """One instruction that devices take part in together.

    `bytes` is what it handles on one device in one run: of its operands and its results the larger, so what an
    all-gather has gathered and what a reduce-scatter was given; of a ragged all-to-all what it has room for. It runs
    `times` in a run of the program, or, if it `is_open`, in a turn of a loop whose turns are not known. A group (a row
    of `groups` `[G, S]`, devices by their place in the program's mesh) exchanges with itself alone; for a
    collective-permute rows are pairs of source and target.
    """

    kind: str
    dtype: str
    bytes: int
    times: int
    is_open: bool
    groups: np.ndarray
    op_name: str  # which operation of the Python program it serves, as JAX names it; empty where XLA made it up
    name: str
    shapes: tuple[Shape, ...]  # of the larger of operands and results

    @property
    def total_bytes(self) -> int:
        """Bytes of all times."""
        return self.bytes * self.times

    @property
    def group_size(self) -> int:
        """Devices that exchange with each other."""
        return self.groups.shape[1]

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in all times, when a group is a ring: the least that its links have to carry."""
        share = (self.group_size - 1) / self.group_size
        factors = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.total_bytes * factors.get(self.kind, share)

    def axes(self, layout: Layout) -> tuple[str, ...]:
        """Returns the mesh axes along which groups lie, outermost first. ValueError for another layout's program."""
        mesh = layout.mesh
        if self.groups.size and self.groups.max() >= mesh.size:
            raise ValueError(f"{self.name}: device {self.groups.max()} is not among the {mesh.size} of {layout}")
        # A program numbers its devices in the mesh's order, whatever their own numbers are.
        places = np.stack(np.unravel_index(self.groups, mesh.devices.shape), axis=-1)  # [G, S, axes]
        varies = np.any(places != places[:, :1], axis=(0, 1))
        return tuple(name for name, vary in zip(mesh.axis_names, varies) if vary)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What there is to know of a program from its text.

    Loops whose turns are not known (`open_loops`) count as one turn; `open_flops` are those of `matmul_flops` that are
    inside them. Of branches, the one with the most to multiply counts, and the collectives of all. `opaque_calls` are
    kernels whose inside the text does not show, by name, with their times: what they multiply is not counted.
    """

    collectives: tuple[Collective, ...]
    matmul_flops: int
    open_flops: int
    open_loops: tuple[str, ...]
    opaque_calls: Mapping[str, int]


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, in the order of its text."""
    return list(read(text).collectives)


def read(text: str) -> Reading:
    """Returns what a program's text says; ValueError for one that holds no program."""
    return _Reader(text).read()


def bytes_along(found: Iterable[Collective], layout: Layout, *axes: str, kind: str | None = None) -> int:
    """Returns the bytes of all times of the collectives along just these axes, of one kind or of all."""
    return sum(c.total_bytes for c in found if c.axes(layout) == axes and kind in (None, c.kind))


class _Reader:
    def __init__(self, text: str) -> None:
        self.computations, self.entry = parse(text)
        found = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
        self.num_devices = int(found[1]) if found else 1
        self.collectives: list[Collective] = []
        self.open_loops: list[str] = []
        self.open_flops = 0
        self.opaque_calls: dict[str, int] = {}

    def read(self) -> Reading:
        flops = self._walk(self.entry, 1, is_open=False)
        return Reading(
            collectives=tuple(self.collectives),
            matmul_flops=flops,
            open_flops=self.open_flops,
            open_loops=tuple(dict.fromkeys(self.open_loops)),
            opaque_calls=self.opaque_calls,
        )

    def _walk(self, computation: str, times: int, *, is_open: bool, counter: Counter | None = None) -> int:
        """Notes what a computation does that runs `times`, in turns of a loop that `counter` counts.

        Returns its multiplications' FLOPs of all times.
        """
        instructions, flops = self.computations[computation], 0
        for one in instructions.values():
            if one.kind is not None:
                self.collectives.append(self._read_collective(one, instructions, times, is_open))
                continue
            flops += times * self._matmul_flops(one, instructions, times)
            own = find_counter(one) if one.opcode == "while" else None
            inner, begins_open = times * own.turns if own else times, False
            if one.opcode == "while" and own is None:
                turns = counter and count_turns(one, computation, self.computations, counter)
                begins_open = turns is None
                inner = times * turns // counter.turns if counter and turns is not None else times
            called = sum(self._walk(name, inner, is_open=is_open or begins_open, counter=own) for name in one.called)
            if begins_open:
                self.open_loops.append(one.name)
                self.open_flops += 0 if is_open else called
            flops += called
            flops += max((self._walk(name, times, is_open=is_open) for name in one.branches), default=0)
        return flops

    def _read_collective(
        self, one: Instruction, beside: Mapping[str, Instruction], times: int, is_open: bool
    ) -> Collective:
        operands = tuple(shape for name in one.operands for shape in beside[name].shapes)
        results = one.shapes
        if one.opcode.endswith("-start") and len(results) > len(operands):
            # The first half of what `-start` gives is its operands again.
            results = results[len(operands) : 2 * len(operands)]
        if one.kind == "ragged-all-to-all":
            operands, results = operands[:1], operands[1:2]  # what it is written into; the others are sizes
        size = lambda shapes: sum(shape.num_bytes for shape in shapes)
        larger = max(operands, results, key=size)
        op_name = re.search(r'\bop_name="([^"]*)"', one.attributes)
        groups = _GROUPS.search(one.attributes)
        assert one.kind is not None
        return Collective(
            kind=one.kind,
            dtype=max(larger, key=lambda shape: shape.num_bytes).dtype,
            bytes=size(larger),
            times=times,
            is_open=is_open,
            groups=read_groups(groups[1] if groups else "{}", self.num_devices),
            op_name=op_name[1] if op_name else "",
            name=one.name,
            shapes=larger,
        )

    def _matmul_flops(self, one: Instruction, beside: Mapping[str, Instruction], times: int) -> int:
        if one.opcode == "dot":
            contracted = re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        elif one.opcode == "custom-call" and one.target.startswith(MATMUL_TARGETS):
            contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
        else:
            if one.opcode == "convolution" or (one.opcode == "custom-call" and _is_kernel(one.target)):
                name = one.target or one.opcode
                self.opaque_calls[name] = self.opaque_calls.get(name, 0) + times
            return 0
        dims = [int(dim) for dim in re.findall(r"\d+", contracted[1])] if contracted else []
        left = beside[one.operands[0]].shapes[0].dims
        return 2 * math.prod(one.shapes[0].dims) * math.prod(left[dim] for dim in dims)


def _is_kernel(target: str) -> bool:
    """Whether a custom call may multiply matrices: not those that only allocate, mark shardings, sort or call back."""
    harmless = ("AllocateBuffer", "Sharding", "TopK", "Sort", "callback", "annotate", "Bitcast", "Pin", "Unpin", "Move")
    return not any(word in target for word in harmless)


def read_groups(text: str, num_devices: int) -> np.ndarray:
    """Returns the groups `[G, S]` that XLA writes as lists, as a permuted count, or as axes of a mesh."""
    if text == "{}":
        return np.arange(num_devices)[None]
    if text.startswith("{{"):
        return np.array([read_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)])
    if not text.startswith("mesh"):
        shape, order = text.split("<=")
        return _read_iota(order).reshape(read_numbers(shape.strip("[]")))
    sizes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", text)]
    given = re.search(r"device_ids=\((.*?)\)\s*\{", text)
    ids = _read_iota(given[1]) if given else np.arange(math.prod(size for _, size in sizes))
    inside = re.findall(r"'(\w+)'", text[text.rindex("{") :])
    together = [place for place, (name, _) in enumerate(sizes) if name in inside]
    grid = np.moveaxis(ids.reshape([size for _, size in sizes]), together, range(-len(together), 0))
    return grid.reshape(-1, math.prod(sizes[place][1] for place in together))


def _read_iota(text: str) -> np.ndarray:
    found = _IOTA.search(text)
    if found is None:
        raise ValueError(f"hlo: devices are written as '{text}', which is no known form")
    dims = read_numbers(found[1])
    grid = np.arange(math.prod(dims)).reshape(dims)
    return (grid.transpose(read_numbers(found[2])) if found[2] else grid).ravel()
