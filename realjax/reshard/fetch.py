"""Small results on the host, in every process, wherever they were computed."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from realjax.reshard.apply import reshard


def fetch_arrays(tree: Any) -> Any:
    """Returns a tree of small arrays, however they are spread, as numpy ones in every process.

    Every process must call this.
    """
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    whole = jax.tree.map(lambda leaf: NamedSharding(leaf.sharding.mesh, PartitionSpec()), tree)
    # One by one: different arrays may belong to different processes.
    return jax.tree.map(fetch, reshard(tree, whole)[0])


def fetch(tree: Any) -> Any:
    """Returns the scalars, or other whole arrays, of one call as numpy ones in every process, also where none of the
    call's devices is.

    Every process must call this.
    """
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    leaves, treedef = jax.tree.flatten(tree)
    owners = {device.process_index for leaf in leaves for device in leaf.sharding.device_set}
    is_owner = jax.process_index() in owners
    values = [np.asarray(leaf) if is_owner else np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    if len(owners) < jax.process_count():
        values = multihost_utils.broadcast_one_to_all(values, is_source=jax.process_index() == min(owners))
    # A broadcast adds up what the processes have, which makes numbers of booleans.
    return jax.tree.unflatten(treedef, [np.asarray(v, leaf.dtype) for v, leaf in zip(values, leaves, strict=True)])
