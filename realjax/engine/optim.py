"""The optimizer as optax builds it, and how its state is spread."""

import jax
import jax.numpy as jnp
import optax

from realjax.core.axes import optimizer_rules, tree_shardings
from realjax.core.layout import Layout
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import Tree, map_paths
from realjax.models.build import Model


def decay_mask(params: Tree) -> Tree:
    """Returns True for every parameter that weight decay applies to: all but norms' scales and biases."""
    return map_paths(lambda path, _: path.rsplit("/", 1)[-1] not in ("scale", "bias"), params)


def make_optimizer(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Returns AdamW (arXiv:1711.05101) whose rate follows the config's schedule over `total_updates` updates."""
    return optax.adamw(
        learning_rate=lambda count: config.learning_rate(jnp.asarray(count), total_updates),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def clip_by_norm(grads: Tree, max_norm: float) -> tuple[Tree, jax.Array]:
    """Returns gradients scaled down to the global norm `max_norm` where they exceed it, and the norm before."""
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, grads), norm


def state_shardings(
    model: Model, optimizer: optax.GradientTransformation, layout: Layout
) -> tuple[Tree, optax.OptState]:
    """Returns the shardings of the fp32 master parameters and of the optimizer state, both by the optimizer's table."""
    params = tree_shardings(model.axes, model.abstract, optimizer_rules(layout.strategy), layout)
    abstract = jax.eval_shape(optimizer.init, model.abstract)
    state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract,
        params,
        transform_non_params=lambda _: layout.replicated,
    )
    return params, state
