"""How a call could run: what the planner weighs, and what it decides for the calls that leave it open."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from realjax.core.json_text import JsonObject, parse_json
from realjax.core.layout import ParallelStrategy

PLAN_FILE = "plan.json"  # of a run's log directory


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A call's split, its devices, and how its program goes over its batch.

    Devices are numbered node by node. The last three fields are read by the cost model alone, for plans made elsewhere:
    realjax runs them with 1, and shares experts among devices with rows of their own, as its strategy says.
    """

    strategy: ParallelStrategy
    devices: tuple[int, ...]
    num_mbs: int = 1  # inference and train: micro-batches of an update
    remat: bool = False  # train: layers are computed again in the backward pass
    num_slots: int | None = None  # generate: answers decoded at once
    # generate: when so few are left, they go on with `tail_tp` devices that share each layer; None: they stay.
    tail_slots: int | None = None
    tail_tp: int | None = None
    context: int = 1  # devices that share the tokens of a sequence
    experts: int = 1  # devices that share the experts of a layer, where these are not among the strategy's `dp`
    interleave: int = 1  # parts of the layers that each pipeline stage has

    @property
    def expert_shards(self) -> int:
        """Devices that share the experts of a layer."""
        return max(self.experts, self.strategy.ep)

    @property
    def tail(self) -> "Choice | None":
        """How the last answers of a generate call are decoded, where that is another way."""
        s, tp = self.strategy, self.tail_tp or 0
        if not self.tail_slots or tp <= s.tp or tp % s.tp or s.dp % (tp // s.tp):
            return None
        after = replace(s, dp=s.dp * s.tp // tp, tp=tp)
        return replace(self, strategy=after, num_slots=self.tail_slots, tail_slots=None, tail_tp=None)

    def __str__(self) -> str:
        more = [f"{self.num_mbs} micro-batches"] if self.num_mbs > 1 else []
        more += ["remat"] if self.remat else []
        more += [f"{self.num_slots} slots"] if self.num_slots else []
        more += [f"the last {self.tail_slots} on {tail.strategy}"] if (tail := self.tail) else []
        return ", ".join([str(self.strategy), *more])

    def to_json(self) -> JsonObject:
        """Returns it as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: JsonObject) -> "Choice":
        """Returns what `to_json` was made of."""
        own = {**values, "strategy": ParallelStrategy(**values["strategy"]), "devices": tuple(values["devices"])}
        return cls(**own)


Choices = Mapping[str, Choice]  # by call


def dump_choices(choices: Choices, *, searched: bool = True, machine: str | None = None) -> str:
    """Returns choices as JSON, with whether a search has found them, and for which machine (`find_machine`)."""
    calls = {name: choice.to_json() for name, choice in choices.items()}
    return json.dumps({"searched": searched, "machine": machine, "calls": calls}, indent=1)


def load_choices(text: str) -> Choices:
    """Returns what `dump_choices` was made of."""
    return {name: Choice.from_json(values) for name, values in parse_json(text.encode())["calls"].items()}


def is_searched(text: str) -> bool:
    """Returns whether choices that were dumped had been found by a search."""
    return parse_json(text.encode())["searched"]


def find_machine(text: str) -> str | None:
    """Returns the machine, as nodes x devices, that choices which were dumped are for; None where that is not said."""
    return parse_json(text.encode()).get("machine")
