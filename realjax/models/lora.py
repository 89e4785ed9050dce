"""Low-rank adapters (LoRA, arXiv:2106.09685): beside a kernel W that stays as it is, a product A B of small rank.

A map with an adapter gives x W + scale * (x A) B. A `[*I, r]` begins at random, B `[r, *O]` at 0, so that nothing is
changed at first. `rank` is the name of the dim r.
"""

import jax
import jax.numpy as jnp
from jax import Array

LEAVES = ("lora_a", "lora_b")  # what a tree of parameters calls A and B


def is_adapter(path: str) -> bool:
    """Returns whether the parameter at a path is an adapter's."""
    return path.rpartition("/")[2] in LEAVES


def merge_stack(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """Returns kernels W `[L, *I, *O]` plus scale * A B of their layers, summed in float32, in their own dtype."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dims = (((a.ndim - 1,), (1,)), ((0,), (0,)))
    product = jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
