"""The optimizer's options and the learning-rate schedule, a pure function of the update's number."""

from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp
from jax import Array


def _option(default, help: str):  # noqa: A002 - the field's own word
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up and decay schedule. Raises ValueError on values outside their range."""

    type: Literal["adam", "empty"] = _option("adam", "adam: AdamW. empty: no optimizer (a role that is never trained)")
    lr: float = _option(1e-5, "peak learning rate")
    weight_decay: float = _option(0.05, "decoupled weight decay; norms and biases are never decayed")
    beta1: float = _option(0.9, "decay of the first moment")
    beta2: float = _option(0.95, "decay of the second moment")
    eps: float = _option(1e-5, "added to the root of the second moment, after bias correction, as PyTorch does")
    min_lr_ratio: float = _option(
        0.0, "the decay is towards min_lr_ratio * lr, which it would reach one update after the last of the run"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _option("cosine", "shape of the decay after warm-up")
    warmup_steps_proportion: float = _option(0.02, "share of all updates spent warming up linearly from 0")
    gradient_clipping: float = _option(1.0, "largest global gradient norm; larger gradients are scaled down to it")
    offload: bool = _option(False, "keep optimizer state in host memory between updates")

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr >= 0, "at least 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
            "eps": (self.eps > 0, "above 0"),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "in [0, 1]"),
            "warmup_steps_proportion": (0 <= self.warmup_steps_proportion <= 1, "in [0, 1]"),
            "gradient_clipping": (self.gradient_clipping > 0, "above 0"),
        }
        for name, (holds, needed) in checks.items():
            if not holds:
                raise ValueError(f"optimizer.{name}: found {getattr(self, name)}; it must be {needed}")

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
