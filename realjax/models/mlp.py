"""The feed-forward that every token goes through."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import Array

from realjax.models.attention import BlockContext
from realjax.models.config import MLPConfig, ModelConfig
from realjax.models.layers import Linear
from realjax.models.stacks import Aux

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nnx.Module):
    """Gated feed-forward, down(act(gate(x)) * up(x)), or the plain one: down(act(up(x)))."""

    def __init__(self, sizes: ModelConfig, config: MLPConfig) -> None:
        D, F = {"embed": sizes.hidden_size}, {"ffn": sizes.ffn_size}
        self.gate = Linear(D, F, config.bias, sizes.find_adapter("gate")) if config.gated else None
        self.up = Linear(D, F, config.bias, sizes.find_adapter("up"))
        self.down = Linear(F, D, config.bias, sizes.find_adapter("down"))
        self.activation = config.activation

    def __call__(self, x_RTD: Array, context: BlockContext) -> tuple[Array, Aux]:
        products, activate = context.products, ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = activate(self.up(x_RTD, products))
        else:
            hidden = activate(self.gate(x_RTD, products)) * self.up(x_RTD, products)
        hidden = context.constrain(hidden, ("rows", "time", "act_ffn"))
        return self.down(hidden, products, "residual_time"), {}

    @staticmethod
    def list_terms(config: MLPConfig) -> dict[str, float]:
        """Returns the names of what a layer gives as `Aux`, with coefficients in the loss; 0: a report alone."""
        return {}
