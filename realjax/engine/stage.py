"""One stage of a training pipeline: its layers on a micro-batch, forward now and backward ticks later.

What a stage keeps of a micro-batch is what one device would keep: with remat the inputs of its layers, without it
whatever their gradients need. So there are no more products than on one device either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.batch import Batch
from realjax.core.trees import Tree
from realjax.engine.manual_axes import hand_back, hand_on, stage_index
from realjax.engine.totals import AddFn, make_sink
from realjax.models.stacks import Aux, PerRow, Stacks


class Halves:
    """`fn(given, sinks, x)` as a forward and a backward half, with arrays that a loop can carry in between.

    `given` is at hand in both, so none of its arrays are kept. `forward` is traced first: the function says what is.
    """

    def __init__(self, fn: Callable[[Any, Tree, Array], Any], add_fn: AddFn) -> None:
        self.fn, self.add_fn = fn, add_fn

    def forward(self, given: Any, sinks: Tree, x: Array) -> tuple[Any, list[Array]]:
        """Returns the function's outputs, and what the backward half needs beside `given`."""
        outputs, pullback = jax.vjp(lambda sinks, x: self.fn(given, sinks, x), sinks, x)
        leaves, self._structure = jax.tree.flatten(pullback)
        # What JAX keeps of an input is the input itself.
        numbers = {id(x): number for number, x in enumerate(jax.tree.leaves(given))}
        self._numbers = [numbers.get(id(leaf)) for leaf in leaves]
        return outputs, [leaf for leaf, number in zip(leaves, self._numbers) if number is None]

    def backward(self, given: Any, kept: list[Array], totals: Tree, grads: Any) -> tuple[Tree, Array]:
        """Returns the totals with the gradients of `sinks` added, and that of `x`, from those of the outputs."""
        own, inputs = iter(kept), jax.tree.leaves(given)
        leaves = [next(own) if number is None else inputs[number] for number in self._numbers]
        totals, (grad_x,) = self.add_fn(totals, jax.tree.unflatten(self._structure, leaves), grads, num_others=1)
        return totals, grad_x


@dataclass(frozen=True)
class Stage:
    """What a stage computes in a tick. Arrays that are split over the stages have a leading dim of 1 in it.

    `batches` `[M, R, T]` are all micro-batches: stage s runs number t - s forward and t - 2(P-1) + s backward. Before
    its first one comes, and after its last, it computes for nothing.
    """

    halves: Halves  # of `fn((stacks, per_row), sinks, x) -> (y, terms)`
    read_fn: Callable[[Batch], PerRow]
    num_stages: int
    num_batches: int
    take_fn: Callable[[Tree], Tree]  # what a layer's parameters have that is trained

    def forward(
        self, stacks: Stacks, received: Array, kept: list[Array], x: Array, batches: Batch, t: Array
    ) -> tuple[Array, Array, list[Array], Aux]:
        """Returns the stage's output, what the one before hands on, what is kept, and terms of the loss.

        `x` `[R, T, D]` is what comes into the first stage.
        """
        turn = t - stage_index()
        (y, terms), own = self.run(stacks, received, x, batches, t)
        kept = [ring.at[0, turn % ring.shape[1]].set(x) for ring, x in zip(kept, own, strict=True)]
        terms = {name: jnp.where(self._is_turn(turn), term, 0)[None] for name, term in terms.items()}
        return y[None], hand_on(y, self.num_stages, is_ring=False)[None], kept, terms

    def run(
        self, stacks: Stacks, received: Array, x: Array, batches: Batch, t: Array
    ) -> tuple[tuple[Array, Aux], list[Array]]:
        """Returns what the stage's layers give, and what their gradients need beside parameters and batch."""
        x = jnp.where(stage_index() == 0, x, received[0])
        sinks = {name: jax.tree.map(make_sink, self.take_fn(stack.params)) for name, stack in stacks.items()}
        return self.halves.forward(self._given(stacks, batches, t - stage_index()), sinks, x)

    def backward(
        self,
        stacks: Stacks,
        returned: Array,
        kept: list[Array],
        totals: Tree,
        grads: tuple[Array, Aux],
        batches: Batch,
        t: Array,
    ) -> tuple[Array, Array, Tree]:
        """Returns the gradient of the stage's input, what the one behind hands back, and the layers' summed gradients.

        `totals` are these sums before. `grads` are of what the last stage gave out, and of the terms of any.
        """
        turn, (grad_y, of_terms) = t - 2 * (self.num_stages - 1) + stage_index(), grads
        grad_y = jnp.where(stage_index() == self.num_stages - 1, grad_y, returned[0])
        # Where it has no turn, nothing comes back through what is kept of the nearest micro-batch.
        grads = jax.tree.map(lambda grad: jnp.where(self._is_turn(turn), grad, 0), (grad_y, of_terms))
        turn = jnp.clip(turn, 0, self.num_batches - 1)
        own = [ring[0, turn % ring.shape[1]] for ring in kept]
        totals, grad_x = self.halves.backward(self._given(stacks, batches, turn), own, totals, grads)
        return grad_x[None], hand_back(grad_x, self.num_stages)[None], totals

    def _given(self, stacks: Stacks, batches: Batch, turn: Array) -> tuple[Stacks, PerRow]:
        return stacks, self.read_fn(take_batch(batches, turn))

    def _is_turn(self, turn: Array) -> Array:
        return (turn >= 0) & (turn < self.num_batches)


def take_batch(batches: Batch, turn: Array) -> Batch:
    """Returns a micro-batch; the first or the last where there is none of that number."""
    return jax.tree.map(lambda x: jnp.take(x, turn, axis=0, mode="clip"), batches)
