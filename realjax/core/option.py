"""How an option is declared: its default, its meaning and its range; and the one check of all ranges."""

import dataclasses
import types
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Protocol, get_args

# Of whole numbers without a bound of their own: steps and tokens are counted in 32 bits.
MOST = 2**31 - 1


class DataclassInstance(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option may be, from `at_least` or `above` to `at_most` or `below`; None is no bound."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def find_need(self, value: float) -> str | None:
        """Returns what `value` would have to be, None where it is in the range."""
        is_high_enough = (self.at_least is None or value >= self.at_least) and (
            self.above is None or value > self.above
        )
        is_low_enough = (self.at_most is None or value <= self.at_most) and (self.below is None or value < self.below)
        if is_high_enough and is_low_enough:
            return None
        # A whole number's upper bound is what no machine can hold: nobody who is below needs to know it.
        return str(self) if isinstance(value, float) else self._upper if is_high_enough else self._lower

    @property
    def _lower(self) -> str:
        return f"at least {self.at_least}" if self.at_least is not None else f"above {self.above}"

    @property
    def _upper(self) -> str:
        return f"at most {self.at_most}" if self.at_most is not None else f"below {self.below}"

    def __str__(self) -> str:
        has_lower = self.at_least is not None or self.above is not None
        has_upper = self.at_most is not None or self.below is not None
        if not (has_lower and has_upper):
            return self._lower if has_lower else self._upper if has_upper else ""
        start = f"[{self.at_least}" if self.at_least is not None else f"({self.above}"
        end = f"{self.at_most}]" if self.at_most is not None else f"{self.below})"
        return f"in {start}, {end}"


def option(
    default: Any = MISSING,
    help: str = "",  # noqa: A002 - the field's own word
    **bounds: float,
) -> Any:
    """Returns the field of one option; without `default` it is required. `bounds` are those of `Range`."""
    return dataclasses.field(default=default, metadata={"help": help, "range": Range(**bounds)})


def nested(cls: type, **changes: object) -> Any:
    """Returns the field of a nested dataclass whose defaults are those of `cls` with `changes`."""
    return dataclasses.field(default_factory=lambda: cls(**changes))


def check_ranges(config: DataclassInstance) -> None:
    """Raises ValueError for the first option of `config` outside its range; None is always allowed."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata.get("range", Range())
        if type(value) is int and allowed.at_most is None and allowed.below is None:
            allowed = dataclasses.replace(allowed, at_most=MOST)
        if isinstance(value, int | float) and (need := allowed.find_need(value)) is not None:
            need += ", or null" if types.NoneType in get_args(field.type) else ""
            raise ValueError(f"{field.name}: found {value}; it must be {need}")


def check_conditions(config: DataclassInstance, **conditions: tuple[bool, str]) -> None:
    """Raises ValueError for the first option whose condition does not hold; each comes with what is needed."""
    for name, (holds, needed) in conditions.items():
        if not holds:
            raise ValueError(f"{name}: found {getattr(config, name)}; it must be {needed}")
