"""What an attention kernel is to serve."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from realjax.core.layout import Layout
from realjax.models.config import ModelConfig

# Packed rows of a training step or of inference; whole prompts, one a row; one new token a row against the cache.
Use = Literal["rows", "prefill", "decoding"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A use of a model's attention on a kind of device."""

    use: Use
    platform: str  # "cpu", "gpu", "tpu"
    dtype: str
    head_dim: int
    num_q_heads: int = 1
    num_kv_heads: int = 1
    # Of the model's layers: the shortest window, a cap and a scale of scores, each None where none has one.
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    capability: tuple[int, int] | None = None  # CUDA's compute capability, None where it is not known

    @classmethod
    def of(cls, use: Use, config: ModelConfig, layout: Layout, dtype: jnp.dtype) -> "Case":
        """Returns the case of a model that computes in `dtype` on a layout's devices."""
        mixers = [kind.mixer for kind in config.pattern]
        windows = [mixer.window for mixer in mixers if mixer.window is not None]
        return cls(
            use=use,
            platform=layout.devices[0].platform,
            dtype=dtype.name,
            head_dim=config.head_dim,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            window=min(windows, default=None),
            softcap=next((mixer.softcap for mixer in mixers if mixer.softcap is not None), None),
            scale=next((mixer.scale for mixer in mixers if mixer.scale is not None), None),
            sinks=any(mixer.sinks for mixer in mixers),
            capability=find_capability(layout.devices[0]),
        )


def find_capability(device: jax.Device) -> tuple[int, int] | None:
    """Returns a device's CUDA compute capability, None for any other device."""
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and all(n.isdigit() for n in numbers) else None
