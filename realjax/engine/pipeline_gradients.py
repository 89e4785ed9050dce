"""Gradients on P pipeline stages, one micro-batch forward and one backward in a tick (1F1B, arXiv:2104.04473).

At tick t stage s runs micro-batch t - s forward and t - 2(P-1) + s backward: the last one turns it round within a
tick, and none keeps more than 2P - 1 of them, however many M there are. P - 1 ticks have a forward half alone, then M
have both, then P - 1 a backward half: a step takes as long as M + P - 1 micro-batches in one stage. Embedding and head
have their place in each tick, on all devices, which split the vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import make_constrain, optimizer_rules
from realjax.core.batch import Batch
from realjax.core.layout import Layout
from realjax.core.loss import Loss, LossSums
from realjax.core.trees import Tree
from realjax.engine.forward import ForwardParts, make_terms
from realjax.engine.manual_axes import over_stages
from realjax.engine.pipeline import num_step_batches
from realjax.engine.rows import deal_rows
from realjax.engine.stage import Halves, Stage, take_batch
from realjax.engine.totals import make_sink
from realjax.models.config import cut_order
from realjax.models.stacks import Aux, PerRow, Stacks, join_kinds, split_kinds
from realjax.models.transformer import TABLES, read_rows

GradientsFn = Callable[[Tree, Mapping[str, Array], Batch], tuple[Tree, LossSums]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Flow:
    """What goes from tick to tick. Where there is a leading dim P, each stage has its own part."""

    received: Array  # [P, R, T, D] from the stage before
    returned: Array  # [P, R, T, D] gradients, from the stage behind
    kept: list[Array]  # [P, 2P-1, ...] for the backward halves of the micro-batches on their way
    grads: Tree
    sums: LossSums
    terms: Aux  # [P]


def make_pipeline_gradients(parts: ForwardParts, loss: Loss, layout: Layout, num_mbs: int) -> GradientsFn:
    """Returns `fn(params, shares, batch) -> (gradients of the summed loss, sums)`, float32.

    `shares` are those of `LossSums.with_terms`. There are at least `num_mbs` micro-batches, see `num_step_batches`.
    """

    def gradients(params: Tree, shares: Mapping[str, Array], batch: Batch) -> tuple[Tree, LossSums]:
        num_batches = num_step_batches(batch.num_rows, num_mbs, layout)
        flow = Schedule(parts, loss, layout, params, shares, deal_rows(batch, num_batches)).run()
        terms = make_terms(parts.model, {name: term.sum(axis=0) for name, term in flow.terms.items()}, batch)
        return flow.grads, flow.sums.with_terms(terms, shares)

    return gradients


class Schedule:
    """The ticks of a step of M micro-batches, arrays `[M, R, ...]`."""

    def __init__(
        self, parts: ForwardParts, loss: Loss, layout: Layout, params: Tree, shares: Mapping[str, Array], batches: Batch
    ) -> None:
        self.parts, self.loss, self.layout, self.params, self.shares = parts, loss, layout, params, dict(shares)
        self.num_stages, self.num_batches, self.batches = layout.strategy.pp, batches.num_rows, batches
        self.config, self.axes = parts.model.config, parts.model.axes
        self.constrain = make_constrain(optimizer_rules(layout.strategy), layout)
        blocks, self.stacks = parts.make_stacks(params)
        order = cut_order(self.config.order, self.num_stages)

        def run_layers(given: tuple[Stacks, PerRow], sinks: Tree, x: Array) -> tuple[Array, Aux]:
            stacks = {name: replace(stack, sinks=sinks[name]) for name, stack in given[0].items()}
            return parts.forward.run_layers_fn(blocks, order, stacks, x, given[1])

        read = lambda batch: read_rows(self.config, batch, parts.forward.products)
        halves, take = Halves(run_layers, parts.add_gradients), parts.model.take_trained
        self.stage = Stage(halves, read, self.num_stages, self.num_batches, take)

    def run(self) -> Flow:
        """Returns what is summed when all micro-batches are back."""
        P, M = self.num_stages, self.num_batches

        def tick(t: Array, flow: Flow) -> Flow:
            outputs, grad_x = jnp.zeros_like(flow.received), jnp.zeros_like(flow.received[0])
            is_last_in = (t >= P - 1) & (t < P - 1 + M)
            flow, outputs = _run_if(t < P - 1 + M, lambda flow, _: self.forward(flow, t), (flow, outputs))
            flow, grad_x = _run_if(is_last_in, lambda flow, _: self.turn_round(flow, outputs, t), (flow, grad_x))
            (flow,) = _run_if(t >= P - 1, lambda flow: (self.backward(flow, grad_x, t),), (flow,))
            return flow

        # One loop, not one each for ticks with other halves: each half is compiled once.
        return jax.lax.fori_loop(0, 2 * P - 2 + M, tick, self.start())

    def forward(self, flow: Flow, t: Array) -> tuple[Flow, Array]:
        """Returns the flow after a forward half, and what comes out of the stages, `[P, R, T, D]`."""
        x = self.parts.embed(self.params, take_batch(self.batches, t))
        run = over_stages(self.stage.forward, self.layout, num_split=3)
        outputs, received, kept, terms = run(self.stacks, flow.received, flow.kept, x, self.batches, t)
        terms = jax.tree.map(jnp.add, flow.terms, terms)
        # As it is: XLA would read what is kept from a copy.
        return replace(flow, received=received, kept=jax.lax.optimization_barrier(kept), terms=terms), outputs

    def turn_round(self, flow: Flow, outputs: Array, t: Array) -> tuple[Flow, Array]:
        """Returns the flow with the loss of what came out of the last stage, and its gradient, `[R, T, D]`."""
        batch = take_batch(self.batches, t - (self.num_stages - 1))

        def summed_loss(sinks: Tree, x: Array) -> tuple[Array, LossSums]:
            sums = self.loss.fn(self.parts.read_out(self.params, x, batch, sinks), batch)
            return sums.loss.sum, sums

        # As they are: XLA would widen 16-bit numbers before it sends them.
        x = jax.lax.optimization_barrier(outputs[-1])
        outer = {name: total for name, total in flow.grads.items() if name != "layers"}
        loss, pullback, sums = jax.vjp(summed_loss, jax.tree.map(make_sink, outer), x, has_aux=True)
        outer, (grad_x,) = self.parts.add_gradients(outer, pullback, jnp.ones_like(loss), num_others=1)
        return replace(flow, grads=flow.grads | outer, sums=jax.tree.map(jnp.add, flow.sums, sums)), grad_x

    def backward(self, flow: Flow, grad_x: Array, t: Array) -> Flow:
        """Returns the flow after a backward half; `grad_x` comes into the last stage."""
        run, totals = over_stages(self.stage.backward, self.layout, num_split=4), flow.grads
        of_terms = {name: jnp.zeros(term.shape[1:], term.dtype) for name, term in flow.terms.items()} | self.shares
        of_layers, grads = split_kinds(self.config, totals["layers"]), (grad_x, of_terms)
        grads_x, returned, of_layers = run(self.stacks, flow.returned, flow.kept, of_layers, grads, self.batches, t)
        totals = totals | {"layers": join_kinds(of_layers)} | self._add_tables(totals, grads_x, t)
        return replace(flow, returned=returned, grads=self.constrain.tree(totals, self.axes))

    def _add_tables(self, totals: Tree, grads_x: Array, t: Array) -> Tree:
        """Returns the totals of the tables, if these are trained, with what comes out of the first stage."""
        batch = take_batch(self.batches, t - 2 * (self.num_stages - 1))
        if not (tables := {name: total for name, total in totals.items() if name in TABLES}):
            return {}
        embed = lambda sinks: self.parts.embed(self.params, batch, sinks)
        _, pullback = jax.vjp(embed, jax.tree.map(make_sink, tables))
        return self.parts.add_gradients(tables, pullback, jax.lax.optimization_barrier(grads_x[0]))[0]

    def start(self) -> Flow:
        """Returns the flow before the first tick: zeros."""
        P, t = self.num_stages, jnp.zeros((), int)
        zeros = lambda shapes: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        first = take_batch(self.batches, t)
        x = jax.eval_shape(self.parts.embed, self.params, first)
        sums = jax.eval_shape(lambda x: self.loss.fn(self.parts.read_out(self.params, x, first), first), x)
        flight = jnp.zeros((P, *x.shape), x.dtype)
        stage = lambda *args: jax.tree.map(lambda y: y[None], self.stage.run(*args))
        run = over_stages(stage, self.layout, num_split=2)
        (_, terms), kept = jax.eval_shape(run, self.stacks, flight, x, self.batches, t)
        kept = [jnp.zeros((P, 2 * P - 1, *x.shape[1:]), x.dtype) for x in kept]
        trained = self.parts.model.take_trained(self.params)
        grads = self.constrain.tree(jax.tree.map(make_sink, trained), self.axes)
        return Flow(flight, flight, kept, grads, zeros(sums), zeros(terms))


def _run_if(condition: Array, fn: Callable[..., tuple[Any, ...]], state: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns `fn(*state)`, which is like the state, where the condition holds on all devices, else the state.

    A loop of at most one turn: around conditionals, XLA copies what it updates in place in loops.
    """
    carry = (condition, state)
    return jax.lax.while_loop(lambda carry: carry[0], lambda carry: (jnp.zeros((), bool), fn(*carry[1])), carry)[1]
