"""Gradients on P pipeline stages, one micro-batch forward and one backward in a tick (1F1B, arXiv:2104.04473).

At tick t stage s runs micro-batch t - s forward and t - 2(P-1) + s backward: the last one turns it round within a
tick, and none keeps more than 2P - 1 of them, however many M there are. P - 1 ticks have a forward half alone, then M
have both, then P - 1 a backward half: a step takes as long as M + P - 1 micro-batches in one stage. Embedding and head
have their place in each tick, on all devices, which split the vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import make_constrain, optimizer_rules
from realjax.core.batch import Batch
from realjax.core.layout import Layout
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean
from realjax.core.trees import Tree
from realjax.engine.forward import ForwardParts, term_weights
from realjax.engine.manual_axes import over_stages
from realjax.engine.pipeline import num_step_batches
from realjax.engine.rows import deal_rows
from realjax.engine.stage import Halves, Stage, make_sink, take_batch
from realjax.models.config import cut_order
from realjax.models.stacks import Aux, PerRow, Stacks, join_kinds, split_kinds
from realjax.models.transformer import read_positions

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
        weights = term_weights(parts.model, batch)
        terms = {name: Mean(term.sum(), weights[name]) for name, term in flow.terms.items()}
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

        read = lambda batch: read_positions(self.config, batch["positions"], batch["segment_ids"])
        self.stage = Stage(Halves(run_layers), read, self.num_stages, self.num_batches)

    def run(self) -> Flow:
        """Returns what is summed when all micro-batches are back."""
        P, M = self.num_stages, self.num_batches
        forward = lambda flow, t: (self.forward(flow, t)[0], None)
        both = lambda flow, t: (self.backward(*self.turn_round(*self.forward(flow, t), t), t), None)
        backward = lambda flow, t: (self.backward(flow, jnp.zeros_like(flow.received[0]), t), None)
        flow, _ = jax.lax.scan(forward, self.start(), jnp.arange(0, P - 1))
        flow, _ = jax.lax.scan(both, flow, jnp.arange(P - 1, P - 1 + M))
        flow, _ = jax.lax.scan(backward, flow, jnp.arange(P - 1 + M, 2 * P - 2 + M))
        return flow

    def forward(self, flow: Flow, t: Array) -> tuple[Flow, Array]:
        """Returns the flow after a forward half, and what comes out of the last stage, `[R, T, D]`."""
        x = self.parts.embed(self.params, take_batch(self.batches, t))
        run = over_stages(self.stage.forward, self.layout, num_split=3)
        outputs, received, kept, terms = run(self.stacks, flow.received, flow.kept, x, self.batches, t)
        # As they are: XLA would widen 16-bit numbers before it sends them, and read what is kept from a copy.
        out, kept = jax.lax.optimization_barrier((outputs[-1], kept))
        return replace(flow, received=received, kept=kept, terms=jax.tree.map(jnp.add, flow.terms, terms)), out

    def turn_round(self, flow: Flow, x: Array, t: Array) -> tuple[Flow, Array]:
        """Returns the flow with the loss of what came out of the last stage, and its gradient, `[R, T, D]`."""
        batch = take_batch(self.batches, t - (self.num_stages - 1))

        def summed_loss(sinks: Tree, x: Array) -> tuple[Array, LossSums]:
            sums = self.loss.fn(self.parts.read_out(self.params, x, batch, sinks), batch)
            return sums.loss.sum, sums

        sinks = jax.tree.map(make_sink, {name: leaf for name, leaf in self.params.items() if name != "layers"})
        (grads, grad_x), sums = jax.grad(summed_loss, argnums=(0, 1), has_aux=True)(sinks, x)
        return replace(flow, grads=_add(flow.grads, grads), sums=jax.tree.map(jnp.add, flow.sums, sums)), grad_x

    def backward(self, flow: Flow, grad_x: Array, t: Array) -> Flow:
        """Returns the flow after a backward half; `grad_x` comes into the last stage."""
        run, totals = over_stages(self.stage.backward, self.layout, num_split=4), flow.grads
        of_layers, grads = split_kinds(self.config, totals["layers"]), (grad_x, self.shares)
        grads_x, returned, of_layers = run(self.stacks, flow.returned, flow.kept, of_layers, grads, self.batches, t)
        batch = take_batch(self.batches, t - 2 * (self.num_stages - 1))
        embed = lambda sink: self.parts.embed(self.params, batch, {"embed": sink})
        _, pullback = jax.vjp(embed, jax.tree.map(make_sink, self.params["embed"]))
        (of_table,) = pullback(jax.lax.optimization_barrier(grads_x[0]))
        totals = _add({**totals, "layers": join_kinds(of_layers)}, {"embed": of_table})
        return replace(flow, returned=returned, grads=self.constrain.tree(totals, self.axes))

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
        grads = self.constrain.tree(jax.tree.map(make_sink, self.params), self.axes)
        return Flow(flight, flight, kept, grads, zeros(sums), zeros(terms))


def _add(total: Tree, grads: Tree) -> Tree:
    """Returns the sums of all parameters, with the gradients of some added."""
    return {**total, **{name: jax.tree.map(jnp.add, total[name], grad) for name, grad in grads.items()}}
