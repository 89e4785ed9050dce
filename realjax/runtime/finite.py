"""Numbers that are not finite, found before anything is computed with them or written."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.core.layout import Layout
from realjax.core.trees import Tree, flatten_paths
from realjax.engine.batching import Generation
from realjax.reshard.fetch import fetch
from realjax.reshard.plan import memory_kind


def nonfinite_leaves(params: Tree, home: Layout) -> list[str]:
    """Returns the names of the parameters on `home` that hold nan or inf. Every process must call this."""
    leaves = flatten_paths(params)
    on_devices = {name: leaf for name, leaf in leaves.items() if memory_kind(leaf.sharding) == "device"}
    is_finite = {name: _is_finite_on_host(leaves[name]) for name in leaves.keys() - on_devices.keys()}
    if on_devices:
        is_finite |= fetch(jax.jit(_are_finite, out_shardings=home.replicated)(on_devices))
    return [name for name in leaves if not is_finite[name]]


def refuse_nonfinite(generations: Sequence[Generation], subject: str) -> None:
    """Raises ValueError for answers of a model whose logits are not finite: their tokens mean nothing."""
    if num_bad := sum(not np.isfinite(generation.logprobs).all() for generation in generations):
        raise ValueError(
            f"{subject}: its logits are not finite in {num_bad} of {len(generations)} answers; give another "
            "checkpoint, or a lower learning rate if it is trained"
        )


def _are_finite(leaves: dict[str, Array]) -> dict[str, Array]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()}


def _is_finite_on_host(leaf: Array) -> bool:
    # Programs do not read host memory as it is; here each process looks at what it holds.
    return all(np.isfinite(np.asarray(shard.data)).all() for shard in leaf.addressable_shards)
