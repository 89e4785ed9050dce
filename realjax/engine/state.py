"""What training carries from step to step. Everything that a resumed run needs of a trained role is here."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from realjax.core.layout import Layout
from realjax.core.trees import Tree
from realjax.engine.optim import Optimizer, state_shardings
from realjax.models.build import Model


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Float32 masters of what is trained, optimizer state, and counters (int32 scalars); or one thing for each, as
    shardings.
    """

    params: Tree
    opt_state: optax.OptState
    num_updates: Any  # updates so far, applied or skipped: the number of the next, by which the schedule goes
    num_skipped: Any  # updates skipped in a row, for gradients that were not finite

    def replace(self, **changes) -> "TrainState":
        return replace(self, **changes)


def train_state_shardings(model: Model, optimizer: Optimizer, layout: Layout) -> TrainState:
    """Returns a TrainState of shardings."""
    params, opt_state = state_shardings(model, optimizer, layout)
    return TrainState(params, opt_state, layout.replicated, layout.replicated)


def abstract_train_state(model: Model, optimizer: Optimizer, layout: Layout) -> TrainState:
    """Returns a TrainState of ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    trained = model.take_trained(model.abstract)
    abstract = TrainState(trained, jax.eval_shape(optimizer.init, trained), zero, zero)

    def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, abstract, train_state_shardings(model, optimizer, layout))


def init_train_state(params: Tree, optimizer: Optimizer, shardings: TrainState) -> TrainState:
    """Returns the state before the first update; `params` are taken over, not copied."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    zero = jax.device_put(jnp.zeros((), jnp.int32), shardings.num_updates)
    return TrainState(params, opt_state, zero, jax.device_put(jnp.zeros((), jnp.int32), shardings.num_skipped))
