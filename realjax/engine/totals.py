"""Gradients of micro-batches, added up as they are made."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ref import freeze, new_ref

from realjax.core.trees import Tree


class AddFn(Protocol):
    """Adds gradients to those of the micro-batches before."""

    def __call__(self, totals: Tree, pullback: Any, grads: Any, *, num_others: int = 0) -> tuple[Tree, list[Array]]:
        """Returns the totals with the gradients of a function's first argument added, and those of its others.

        `pullback` is what `jax.vjp` gives of it, `grads` are of its outputs; each of `num_others` is an array.
        """
        ...


def make_sink(param: Array) -> Array:
    """Returns what `sums.collect` gathers a parameter's gradient in: a total of nothing."""
    return jnp.zeros(param.shape, jnp.float32)


def add_after(totals: Tree, pullback: Any, grads: Any, *, num_others: int = 0) -> tuple[Tree, list[Array]]:
    """An `AddFn`: all gradients of a micro-batch lie beside the totals, which takes twice the memory."""
    own, *others = pullback(grads)
    assert len(others) == num_others
    return jax.tree.map(jnp.add, totals, own), others


def add_in_place(totals: Tree, pullback: Any, grads: Any, *, num_others: int = 0) -> tuple[Tree, list[Array]]:
    """An `AddFn`: a loop over layers adds each layer's to the totals as it goes.

    See https://docs.jax.dev/en/latest/301/refs.html
    """
    refs = jax.tree.map(new_ref, totals)
    as_value = jax.ad.GradValue()  # pyright: ignore[reportPrivateImportUsage] - public, of no module
    _, *others = pullback.with_refs(refs, *[as_value] * num_others)(grads)
    return jax.tree.map(freeze, refs), others
