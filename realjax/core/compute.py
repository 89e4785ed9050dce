"""How a role's programs compute: none of it changes a result beyond rounding."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a user decides of a model's programs; the engine chooses the rest by platform and shape."""

    dtype: str = "auto"  # of activations and of the parameters' copies; auto: float32 on CPUs, bfloat16 elsewhere
    attention: str = "auto"  # see `engine/attention`
    remat: bool = True  # each layer is computed again in the backward pass, instead of kept
    unroll: bool | None = None  # every layer compiled by itself; None: where it pays
    loss_chunk_tokens: int | None = None  # tokens whose logits are in memory at once; None: chosen

    def on(self, platform: str) -> "Compute":
        """Returns this with the dtype that `auto` is on a platform such as cpu."""
        chosen = "float32" if platform == "cpu" else "bfloat16"
        return self if self.dtype != "auto" else replace(self, dtype=chosen)
