"""How a model's programs compute: none of it changes a result beyond rounding."""

from dataclasses import dataclass, replace

import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What may be chosen about a model's programs; the engine chooses the rest by platform and shape.

    Master weights, reductions and losses are float32 whatever `dtype` is.
    """

    dtype: str = "float32"  # of activations and of the parameters' copies; auto: see `on`
    attention: str = "auto"  # see `engine/attention`
    remat: bool = False  # each layer is computed again in the backward pass, instead of kept
    unroll: bool | None = None  # every layer compiled by itself; None: on CPUs, but for `remat`
    loss_chunk_tokens: int | None = None  # tokens whose logits are held at once; None: by memory
    max_segment_len: int | None = None  # no sequence of a call is longer: attention looks no further back

    @property
    def array_dtype(self) -> jnp.dtype:
        """`dtype` as arrays have it."""
        return jnp.dtype(self.dtype)

    def on(self, platform: str) -> "Compute":
        """Returns this with the dtype that `auto` is on a platform: float32 on a cpu, bfloat16 elsewhere."""
        if self.dtype != "auto":
            return self
        return replace(self, dtype="float32" if platform == "cpu" else "bfloat16")
