"""The optimizer as optax builds it, and how its state is spread."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import optax

from realjax.core.axes import optimizer_rules, tree_shardings
from realjax.core.layout import Layout
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import Tree, map_paths
from realjax.models.build import Model


def decay_mask(params: Tree) -> Tree:
    """Returns True for every parameter that weight decay applies to: all but scales of norms, biases and offsets."""
    spared = ("scale", "scale_less_one", "bias", "offset")
    return map_paths(lambda path, _: path.rsplit("/", 1)[-1] not in spared, params)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv:1711.05101). The rate of an update follows from its number in a run of `total_updates`.

    Optax would count the updates that were applied: of a run that skips some, the decay would never end.
    """

    config: OptimizerConfig
    total_updates: int

    def learning_rate(self, number: jax.Array) -> jax.Array:
        """Returns the rate of the update `number`, from 0."""
        return self.config.learning_rate(number, self.total_updates)

    def init(self, params: Tree) -> optax.OptState:
        return self._adamw.init(params)

    def update(
        self, grads: Tree, state: optax.OptState, params: Tree, number: jax.Array
    ) -> tuple[Tree, optax.OptState]:
        """Returns what the update `number` adds to the parameters, and the state after it."""
        *moments, _ = cast(tuple, state)
        updates, state = self._adamw.update(grads, (*moments, optax.ScaleByScheduleState(count=number)), params)
        return cast(Tree, updates), state

    @property
    def _adamw(self) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate=lambda count: self.learning_rate(jnp.asarray(count)),
            b1=self.config.beta1,
            b2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            mask=decay_mask,
        )


def clip_by_norm(grads: Tree, max_norm: float) -> tuple[Tree, jax.Array]:
    """Returns gradients scaled down to the global norm `max_norm` where they exceed it, and the norm before."""
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, grads), norm


def state_shardings(model: Model, optimizer: Optimizer, layout: Layout) -> tuple[Tree, optax.OptState]:
    """Returns the shardings of the fp32 master parameters and of the optimizer state, both by the optimizer's table, of
    what is trained.
    """
    trained = model.take_trained(model.abstract)
    params = tree_shardings(model.axes, trained, optimizer_rules(layout.strategy), layout)
    abstract = jax.eval_shape(optimizer.init, trained)
    state = optax.tree_map_params(
        cast(Callable, optimizer.init),
        lambda _, sharding: sharding,
        abstract,
        params,
        transform_non_params=lambda _: layout.replicated,
    )
    return params, state
