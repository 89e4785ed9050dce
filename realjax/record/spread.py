"""A bounded part of many values, evenly spread over all of them."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
MOST_VALUES = 4096


@dataclass
class Spread(Generic[T]):
    """Of the values that were added each of a few, of more every second, every fourth, and so on."""

    values: list[T] = field(default_factory=list)
    count: int = 0
    stride: int = 1

    def add(self, value: T) -> None:
        """Takes in a value."""
        if self.count % self.stride == 0:
            self.values.append(value)
        self.count += 1
        if len(self.values) > MOST_VALUES:
            self.values, self.stride = self.values[::2], 2 * self.stride
