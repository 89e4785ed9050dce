"""How often a program's loops turn: as XLA writes beside them, or as follows from the loop around them.

A loop of at most one turn is a way to say `if`. Whether it turns is computed for each turn of the loop around, where
that follows from this one's counter alone.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from realjax.aot.instructions import Computation, Instruction

_TRIPS = re.compile(r"known_trip_count\D*?(\d+)")
_STEP = re.compile(r'known_init_step":\{"init":"(-?\d+)","step":"(-?\d+)"')
_PLACE = re.compile(r'known_induction_variable":\{"tuple_index":"(\d+)"')
_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "and": operator.and_,
    "or": operator.or_,
    **dict.fromkeys(("bitcast", "convert", "copy"), lambda x: x),
}
Elements = Callable[[int], Any]  # what a tuple holds, or the arguments of a computation: scalars, or Elements again


@dataclass(frozen=True, kw_only=True)
class Counter:
    """What a loop counts: `turns` numbers from `first` on, `step` apart; `place` is its place in the loop's state."""

    turns: int
    first: int | None = None  # None: not known
    step: int = 1
    place: int = 0

    @property
    def values(self) -> range:
        """The numbers of all turns."""
        assert self.first is not None
        return range(self.first, self.first + self.turns * self.step, self.step)


def find_counter(loop: Instruction) -> Counter | None:
    """Returns what XLA writes of a loop; None where it does not know how often it turns."""
    turns, step, place = (form.search(loop.attributes) for form in (_TRIPS, _STEP, _PLACE))
    if turns is None:
        return None
    if step is None or place is None:
        return Counter(turns=int(turns[1]))
    return Counter(turns=int(turns[1]), first=int(step[1]), step=int(step[2]), place=int(place[1]))


def count_turns(loop: Instruction, beside: str, computations: Mapping[str, Computation], around: Counter) -> int | None:
    """Returns how often a loop of at most one turn runs in all turns of the loop around, whose body is `beside`.

    None where it may turn more often, or where that does not follow from the counter.
    """
    if around.first is None:
        return None
    evaluator = _Evaluator(computations)
    try:
        return sum(evaluator.does_turn(loop, beside, around, value) for value in around.values)
    except _UnknownError:
        return None


class _UnknownError(Exception):
    """A number follows from more than the counter."""


@dataclass(frozen=True)
class _Evaluator:
    """Computes scalars, and nothing that they do not need."""

    computations: Mapping[str, Computation]

    def does_turn(self, loop: Instruction, beside: str, around: Counter, value: int) -> bool:
        """Returns whether the loop turns when the one around has counted up to `value`."""

        def state(place: int) -> int:
            if place != around.place:
                raise _UnknownError
            return value

        condition, body = loop.attribute("condition"), loop.attribute("body")
        before = self._value(beside, loop.operands[0], lambda _: state)
        if not self._result(condition, lambda _: before):
            return False
        after = self._result(body, lambda _: before)
        if self._result(condition, lambda _: after):
            raise _UnknownError
        return True

    def _result(self, computation: str, arguments: Elements) -> Any:
        root = next(one for one in self.computations[computation].values() if one.is_root)
        return self._value(computation, root.name, arguments)

    def _value(self, computation: str, name: str, arguments: Elements) -> Any:
        one = self.computations[computation][name]
        operand = lambda place: self._value(computation, one.operands[place], arguments)
        match one.opcode:
            case "parameter":
                return arguments(int(one.inside))
            case "constant" if re.fullmatch(r"-?\d+|true|false", one.inside):
                return {"true": 1, "false": 0}[one.inside] if one.inside[-1] == "e" else int(one.inside)
            case "tuple":
                return operand
            case "get-tuple-element":
                return operand(0)(int(one.attribute("index")))
            case "fusion" | "call":
                return self._result(one.called[0], operand)
            case "compare":
                return getattr(operator, one.attribute("direction").lower())(operand(0), operand(1))
            case opcode if opcode in _OPERATIONS:
                return _OPERATIONS[opcode](*map(operand, range(len(one.operands))))
        raise _UnknownError
