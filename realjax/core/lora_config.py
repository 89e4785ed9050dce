"""What the low-rank adapters of a model are (LoRA, arXiv:2106.09685), see `models/lora.py`."""

import math
from dataclasses import dataclass

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
OF_FEED_FORWARD = frozenset(("gate", "up", "down"))


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The adapters of a model. Raises ValueError where there can be none like that."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS  # the maps of every layer that have one
    rank_stabilised: bool = False  # scale is alpha / sqrt(rank) (arXiv:2312.03732), not alpha / rank

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora: found rank {self.rank} and alpha {self.alpha:g}; both must be above 0")
        if not self.targets or not set(self.targets) <= set(TARGETS) or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets: found {' '.join(self.targets) or 'none'}; it needs one or more of {' '.join(TARGETS)}, "
                "each once"
            )

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)
