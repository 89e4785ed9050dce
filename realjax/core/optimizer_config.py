"""The optimizer's options and the learning-rate schedule, a pure function of the update's number."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array

from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up and decay schedule. Raises ValueError on values outside their range."""

    type: Literal["adam", "empty"] = option("adam", "adam: AdamW. empty: no optimizer (a role that is never trained)")
    lr: float = option(1e-5, "peak learning rate", at_least=0)
    weight_decay: float = option(0.05, "decoupled weight decay; norms and biases are never decayed", at_least=0)
    beta1: float = option(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = option(0.95, "decay of the second moment", at_least=0, below=1)
    eps: float = option(1e-5, "added to the root of the second moment, after bias correction, as PyTorch does", above=0)
    min_lr_ratio: float = option(
        0.0,
        "the decay is towards min_lr_ratio * lr, which it would reach one update after the last of the run",
        at_least=0,
        at_most=1,
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option("cosine", "shape of the decay after warm-up")
    warmup_steps_proportion: float = option(
        0.02, "share of all updates spent warming up linearly from 0", at_least=0, at_most=1
    )
    gradient_clipping: float = option(
        1.0, "largest global gradient norm; larger gradients are scaled down to it", above=0
    )
    offload: bool = option(False, "keep optimizer state in host memory between updates")

    def __post_init__(self) -> None:
        check_ranges(self)

    def learning_rate(self, number: Array | int, total_updates: int) -> Array:
        """Returns the rate of the update `number` (0-based) of a run of `total_updates`.

        Warm-up is linear over w = floor(proportion * total_updates) updates and reaches `lr` at update w-1. The decay
        begins at `lr` with update w and would reach its floor with the update after the last, as transformers' and
        PyTorch's do: every update of a run learns, also where it is the only one. (ReaL starts two updates at 0 and
        stops decaying w steps early.)
        """
        n = jnp.asarray(number, jnp.float32)
        num_warmup = int(self.warmup_steps_proportion * total_updates)
        floor = self.min_lr_ratio * self.lr
        progress = jnp.clip((n - num_warmup) / max(total_updates - num_warmup, 1), 0.0, 1.0)
        shape = {
            "constant": jnp.ones_like(progress),
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
        }[self.lr_scheduler_type]
        decayed = floor + (self.lr - floor) * shape
        return jnp.where(n < num_warmup, self.lr * (n + 1) / max(num_warmup, 1), decayed)
