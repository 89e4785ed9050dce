"""How a call could run: what the planner weighs, and what it decides for the calls that leave it open."""

from dataclasses import dataclass

from realjax.core.layout import ParallelStrategy


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A call's split, its devices, and how its program goes over its batch.

    Devices are numbered node by node. The last three fields are read by the cost model alone, for plans made elsewhere:
    realjax runs them with 1.
    """

    strategy: ParallelStrategy
    devices: tuple[int, ...]
    num_mbs: int = 1  # inference and train: micro-batches of an update
    remat: bool = False  # train: layers are computed again in the backward pass
    num_slots: int | None = None  # generate: answers decoded at once
    context: int = 1  # devices that share the tokens of a sequence
    experts: int = 1  # devices that share the experts of a layer
    interleave: int = 1  # parts of the layers that each pipeline stage has

    def __str__(self) -> str:
        more = [f"{self.num_mbs} micro-batches"] if self.num_mbs > 1 else []
        more += ["remat"] if self.remat else []
        more += [f"{self.num_slots} slots"] if self.num_slots else []
        return ", ".join([str(self.strategy), *more])
