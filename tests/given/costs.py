"""Costs of calls and moves that are not those of any machine."""

import random
from dataclasses import dataclass, field

from realjax.allocation.choice import Choice
from realjax.allocation.costing import Move
from realjax.allocation.workload import CallWork, RoleWork


@dataclass(frozen=True, kw_only=True)
class GivenCosts:
    """What a test says, by name of the call or role; the rest is nothing."""

    calls: dict[str, float] = field(default_factory=dict)
    moves: dict[str, float] = field(default_factory=dict)
    fetches: dict[str, float] = field(default_factory=dict)
    home: dict[str, float] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)  # while a call runs
    margin: float = 0.0

    def call_seconds(self, work: CallWork, choice: Choice) -> float:
        return self.calls.get(work.name, 0.0)

    def home_bytes(self, role: RoleWork, work: CallWork, choice: Choice) -> float:
        return self.home.get(role.name, 0.0)

    def call_bytes(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool) -> float:
        return self.held.get(work.name, 0.0)

    def advise(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool, excess_bytes: float) -> str:
        return f"{work.name} by {excess_bytes:.0f}"

    def move(self, role: RoleWork, source: Choice, destination: Choice) -> Move:
        return Move(seconds=self.moves.get(role.name, 0.0), bytes=10.0)

    def fetch(self, role: RoleWork, destination: Choice) -> Move:
        return Move(seconds=self.fetches.get(role.name, 0.0), bytes=5.0)


@dataclass(frozen=True, kw_only=True)
class RandomCosts:
    """Drawn anew for everything that can differ, and the same whenever it is asked for again.

    A call on more devices is mostly faster and smaller. Memory is in units of the device's.
    """

    seed: int
    memory: float
    crowding: float = 0.4  # of a device's memory, the mean of what one thing holds
    margin: float = 0.0

    def draw(self, *about: object) -> float:
        """Returns a number from 0 to 1."""
        return random.Random(repr((self.seed, *about))).random()

    def call_seconds(self, work: CallWork, choice: Choice) -> float:
        about = work.name, choice.strategy, choice.num_mbs, choice.remat, choice.num_slots
        return (0.2 + self.draw("seconds", *about)) * 4 / len(choice.devices) ** 0.7

    def home_bytes(self, role: RoleWork, work: CallWork, choice: Choice) -> float:
        return self._bytes(choice, "home", role.name, choice.strategy)

    def call_bytes(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool) -> float:
        own = self._bytes(choice, "call", work.name, choice.strategy, choice.num_mbs, choice.remat, choice.num_slots)
        return own if at_home else 1.3 * own

    def advise(self, role: RoleWork, work: CallWork, choice: Choice, *, at_home: bool, excess_bytes: float) -> str:
        return f"{work.name} by {excess_bytes:.0f}"

    def move(self, role: RoleWork, source: Choice, destination: Choice) -> Move:
        shared = len(set(source.devices) & set(destination.devices))
        seconds = 0.5 * self.draw("move", role.name, source.strategy, destination.strategy, shared)
        return Move(seconds=seconds, bytes=100 * seconds)

    def fetch(self, role: RoleWork, destination: Choice) -> Move:
        seconds = 0.5 * self.draw("fetch", role.name, destination.strategy)
        return Move(seconds=seconds, bytes=100 * seconds)

    def _bytes(self, choice: Choice, *about: object) -> float:
        return self.memory * self.crowding * 2 * self.draw(*about) / len(choice.devices) ** 0.5
