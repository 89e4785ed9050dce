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
        return (self._moments.init(params), *cast(tuple, self._after.init(params)))

    def update(
        self,
        grads: Tree,
        state: optax.OptState,
        params: Tree,
        number: jax.Array,
        is_applied: jax.Array,
        *,
        moments_first: bool = False,
    ) -> tuple[Tree, optax.OptState]:
        """Returns the parameters and the state after the update `number`, or as they were where it is not applied.

        `moments_first`: they are written before parameters are computed from them. Otherwise a compiler may compute
        them twice, and one that writes one array a loop then copies the old ones, which both read.
        """
        choose = lambda new, old: jax.tree.map(lambda n, o: jnp.where(is_applied, n, o), new, old)
        before, decay, schedule = cast(tuple, state)
        moments = choose(self._moments.update(grads, before)[1], before)
        if moments_first:
            moments = jax.lax.optimization_barrier(moments)
        steps = self._directions(moments)
        updates, after = self._after.update(steps, (decay, optax.ScaleByScheduleState(count=number)), params)
        params, after = choose((optax.apply_updates(params, updates), after), (params, (decay, schedule)))
        return params, (moments, *after)

    def _directions(self, moments: optax.ScaleByAdamState) -> Tree:
        """Returns what Adam (arXiv:1412.6980, algorithm 1) scales by its rate."""
        config, count = self.config, moments.count
        mean = optax.tree.bias_correction(moments.mu, config.beta1, count)
        square = optax.tree.bias_correction(moments.nu, config.beta2, count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mean, square)

    @property
    def _moments(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.config.beta1, b2=self.config.beta2, eps=self.config.eps)

    @property
    def _after(self) -> optax.GradientTransformation:
        """What AdamW does to Adam's directions."""
        return optax.chain(
            optax.add_decayed_weights(self.config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(lambda count: self.learning_rate(jnp.asarray(count))),
        )


def clip_by_norm(sums: Tree, max_norm: float, weight: jax.Array | float = 1.0) -> tuple[Tree, jax.Array]:
    """Returns the gradients `sums / weight`, scaled down to the global norm `max_norm` where they exceed it, and the
    norm before.
    """
    norm = optax.tree.norm(sums) / weight
    # One factor for both: gradients divided before their norm is taken would be another copy of them on a CPU.
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30)) / weight
    return jax.tree.map(lambda g: g * scale, sums), norm


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
