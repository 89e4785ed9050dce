"""The training step: value_and_grad, one division by the global weight, clip, update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import make_constrain, optimizer_rules, resolve, train_rules, tree_shardings
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.layout import Layout
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Last, Mean, Metric, finalize
from realjax.core.trees import Tree, join_trees
from realjax.engine.forward import ForwardParts, OutputsFn, make_compute_copy, make_outputs, term_weights
from realjax.engine.manual_axes import WHOLE, find_data_parts, sum_over_data
from realjax.engine.optim import Optimizer, clip_by_norm
from realjax.engine.pipeline import bubble_share
from realjax.engine.pipeline_gradients import make_pipeline_gradients
from realjax.engine.products import writes_moments_first
from realjax.engine.rows import deal_rows
from realjax.engine.state import TrainState
from realjax.engine.totals import make_sink
from realjax.models.build import Model

TrainStep = Callable[..., tuple[TrainState, Mapping[str, Metric]]]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a training step is computed; none of it changes the result beyond rounding."""

    compute: Compute = Compute()
    num_mbs: int = 1  # micro-batches whose gradients are summed
    # Of terms that layers add to the loss, where they are to be others than the model's; these do change the result.
    term_coefs: Mapping[str, float] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """What the gradients of all rows have in common; or one thing for each, as PartitionSpecs."""

    params: Tree  # in the compute dtype
    shares: Any  # of the terms that layers add to the loss, float32 scalars by name


def make_gradients(
    model: Model, loss: Loss, layout: Layout, options: TrainOptions
) -> Callable[..., tuple[Tree, LossSums]]:
    """Returns `fn(master, batch) -> (gradients of the summed loss, sums)`, float32, spread as the optimizer state.

    Of a model with adapters it is `fn(master, batch, base)`: masters and gradients are of what is trained, and `base`
    has the rest, in the compute dtype.
    """
    rules = train_rules(layout.strategy)
    stored = optimizer_rules(layout.strategy)
    compute_copy = make_compute_copy(model, rules, layout, options.compute.array_dtype, stored)
    parts = ForwardParts(model, loss.readout, rules, layout, options.compute)
    outputs_fn = make_outputs(parts, layout)
    in_stages = make_pipeline_gradients(parts, loss, layout, options.num_mbs)
    constrain = make_constrain(stored, layout)
    coefs = {name: coef for name, coef in {**model.term_coefs(), **options.term_coefs}.items() if coef}
    split = find_data_parts(tree_shardings(model.axes, model.abstract, rules, layout))
    split_trained = model.take_trained(split)

    def summed_loss(sinks: Tree, given: Given, batch: Batch) -> tuple[Array, LossSums]:
        outputs, terms = outputs_fn(given.params, batch, sinks)
        sums = loss.fn(outputs, batch).with_terms(terms, given.shares)
        return sums.loss.sum, sums

    def of_rows(given: Given, batch: Batch) -> tuple[Tree, LossSums]:
        if layout.strategy.pp > 1:
            return in_stages(given.params, given.shares, batch)
        sinks = jax.tree.map(make_sink, model.take_trained(given.params))
        if options.num_mbs == 1:
            (_, sums), grads = jax.value_and_grad(summed_loss, has_aux=True)(sinks, given, batch)
            return constrain.tree(grads, model.axes), sums
        of_sinks = lambda batch: lambda sinks: summed_loss(sinks, given, batch)
        micro_batches = deal_rows(batch, options.num_mbs)
        _, first = jax.eval_shape(lambda batch: of_sinks(batch)(sinks), jax.tree.map(lambda x: x[0], micro_batches))

        def add(so_far: tuple[Tree, LossSums], batch: Batch) -> tuple[tuple[Tree, LossSums], None]:
            totals, sums = so_far
            loss, pullback, own = jax.vjp(of_sinks(batch), sinks, has_aux=True)
            totals, _ = parts.add_gradients(totals, pullback, jnp.ones_like(loss))
            return (constrain.tree(totals, model.axes), jax.tree.map(jnp.add, sums, own)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        return jax.lax.scan(add, (constrain.tree(sinks, model.axes), zeros), micro_batches)[0]

    def gradients(master: Tree, batch: Batch, base: Tree | None = None) -> tuple[Tree, LossSums]:
        params = compute_copy(master if base is None else join_trees(base, master))
        given = Given(params, _term_shares(coefs, term_weights(model, batch), loss, outputs_fn, params, batch))
        if layout.strategy.dp == 1:
            return of_rows(given, batch)
        rows_of_part = (batch.num_rows // options.num_mbs,)
        resolve(("rows",), rows_of_part, rules, layout, "micro-batch")  # refuses devices without a row
        # Each device along `data` sums over its own rows, and the sums cross once; where parameters are split over it,
        # once a layer and micro-batch: a whole gradient on each device is what was to be avoided.
        grads, sums = sum_over_data(of_rows, layout, Given(split, WHOLE), split_trained)(given, batch)
        return constrain.tree(grads, model.axes), sums

    return gradients


def _term_shares(
    coefs: Mapping[str, float],
    weights: Mapping[str, Array],
    loss: Loss,
    outputs_fn: OutputsFn,
    params: Tree,
    batch: Batch,
) -> dict[str, Array]:
    """Returns how much of each term's sum belongs to the summed loss of the whole batch.

    Divided by the loss's weight, as the loss is in the end, the term is then a mean by its own.
    """
    if not coefs:
        return {}
    outputs, _ = jax.eval_shape(outputs_fn, params, batch)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
    num_units = loss.fn(nothing, batch).loss.weight
    return {name: coef * num_units / jnp.maximum(weights[name], 1) for name, coef in coefs.items()}


def make_train_step(
    model: Model,
    loss: Loss,
    optimizer: Optimizer,
    layout: Layout,
    options: TrainOptions,
) -> TrainStep:
    """Returns `step(state, batch) -> (state, metrics)`; an update that is not finite is skipped and counted, one that
    the loss's `skip_fn` refuses is skipped. Metrics are still sums, which merge with those of other updates.

    Of a model with adapters it is `step(state, batch, base)`, see `make_gradients`.
    """
    gradients, max_norm = make_gradients(model, loss, layout, options), optimizer.config.gradient_clipping
    moments_first = writes_moments_first(layout)

    def step(state: TrainState, batch: Batch, base: Tree | None = None) -> tuple[TrainState, Mapping[str, Metric]]:
        grads, sums = gradients(state.params, batch, base)
        grads, grad_norm = clip_by_norm(grads, max_norm, jnp.maximum(sums.loss.weight, 1e-8))
        is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.loss.sum)
        is_refused = jnp.zeros((), bool) if loss.skip_fn is None else loss.skip_fn(finalize(sums.metrics))
        number, is_applied = state.num_updates, is_finite & ~is_refused
        params, opt_state = optimizer.update(
            grads, state.opt_state, state.params, number, is_applied, moments_first=moments_first
        )
        num_skipped = jnp.where(is_finite, 0, state.num_skipped + 1)
        once = lambda value: Mean(value, jnp.ones(()))
        metrics: dict[str, Metric] = {"loss": sums.loss, **sums.metrics, "grad_norm": once(grad_norm)}
        metrics["lr"] = once(optimizer.learning_rate(number))
        if layout.strategy.pp > 1:
            metrics["bubble_share"] = once(jnp.float32(bubble_share(batch.num_rows, options.num_mbs, layout)))
        if loss.skip_fn is not None:
            metrics["early_stop"] = once(is_refused.astype(jnp.float32))
        return TrainState(params, opt_state, number + 1, num_skipped), metrics | {"num_skipped": Last(num_skipped)}

    return step
