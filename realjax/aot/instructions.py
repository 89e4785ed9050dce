"""XLA's text of a program: its computations, their instructions, and the arrays that these give."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

# Of a number, in bits. A shape of another type is an error: bytes would be missing.
BITS = {
    **dict.fromkeys(("token", "opaque"), 0),
    **dict.fromkeys(("s1", "u1"), 1),
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8", "f8e5m2", "f8e4m3", "f8e4m3fn", "f8e8m0fnu"), 8),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
}
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|async_wrapped)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}|\b(?:true|false)_computation=%?([\w.\-]+)")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An array on one device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return -(-math.prod(self.dims) * BITS[self.dtype] // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A line of a computation."""

    name: str
    is_root: bool  # whether the computation gives what it gives
    shapes: tuple[Shape, ...]  # one, or those of a tuple
    opcode: str
    inside: str  # what stands in the opcode's parentheses
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def kind(self) -> str | None:
        """The kind of collective that begins here, None for other instructions."""
        base = self.opcode.removesuffix("-start")
        return base if base in KINDS else None

    @property
    def target(self) -> str:
        """What a custom call calls, empty for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """Returns what stands behind `name=`, a word; ValueError where that is not given."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        if found is None:
            raise ValueError(f"hlo: {self.name} is a {self.opcode} without {name}: '{self.attributes[:80]}'")
        return found[1]

    @property
    def called(self) -> list[str]:
        """The computations that always run."""
        # What an async instruction calls runs once, from its start to its end.
        return [] if self.opcode.endswith(("-done", "-update")) else _CALLED.findall(self.attributes)

    @property
    def branches(self) -> list[str]:
        """The computations of which one runs."""
        names = [several or one for several, one in _BRANCHES.findall(self.attributes)]
        return [name.strip().lstrip("%") for text in names for name in text.split(",")]


Computation = Mapping[str, Instruction]  # by name


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns a program's computations by name, and the name of the one that it begins with.

    ValueError for a text that holds no program.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is None:
            if found := _COMPUTATION.match(line):
                current = computations[found[2]] = {}
                entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _parse_instruction(found[2], _COMMENT.sub("", found[3]), is_root=bool(found[1]))
    if not entry:
        raise ValueError("hlo: the text holds no program; give that of Compiled.as_text()")
    return computations, entry


def _parse_instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    """Reads `f32[8]{0} add(%a, %b), attribute=...`."""
    shape, rest = _split_shape(text)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    return Instruction(
        name=name,
        is_root=is_root,
        shapes=tuple(_read_shapes(shape)),
        opcode=opcode.strip(),
        inside=rest[:end],
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
        attributes=rest[end + 1 :],
    )


def _split_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text[1:]) + 1
    return text[: end + 1], text[end + 1 :]


def _closing(text: str) -> int:
    """Returns where the parenthesis ends that was opened before the text."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"hlo: a parenthesis is not closed in '{text[:80]}'")


def _read_shapes(text: str) -> Iterator[Shape]:
    # Layouts in braces, such as {1,0:T(8,128)S(1)}, are left out.
    for dtype, dims in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", text)):
        if dtype not in BITS:
            raise ValueError(
                f"hlo: the type '{dtype}' of '{text[:80]}' is not known; enter its bits in BITS of aot/instructions.py"
            )
        yield Shape(dtype=dtype, dims=read_numbers(dims))


def read_numbers(text: str) -> tuple[int, ...]:
    """Reads `4,8`."""
    return tuple(int(number) for number in text.split(",") if number)
