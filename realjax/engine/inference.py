"""Forward passes without gradients: outputs for other calls, and the loss of an evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import inference_rules, make_constrain, optimizer_rules
from realjax.core.batch import PER_TOKEN, Batch
from realjax.core.compute import Compute
from realjax.core.draw import Draw
from realjax.core.layout import Layout
from realjax.core.loss import Loss, LossSums, Readout
from realjax.core.trees import Tree
from realjax.engine.forward import ForwardParts, make_compute_copy, make_outputs
from realjax.engine.rows import deal_rows, join_rows
from realjax.models.build import Model


def make_inference(
    model: Model,
    head: str,
    layout: Layout,
    compute: Compute,
    num_mbs: int = 1,
    draw: Draw = Draw(),  # noqa: B008
    num_choices: int | None = None,
) -> Callable[[Tree, Batch], Mapping[str, Array]]:
    """Returns `fn(params, batch) -> outputs` of the head, computed in `num_mbs` parts; params of any dtype.

    Outputs are spread as what the batch has of each token. Log-probabilities are those of the distribution `draw`, of
    `num_choices` tokens with head `choices`.
    """
    rules, compute = inference_rules(layout.strategy), replace(compute, remat=False)
    compute_copy = make_compute_copy(model, rules, layout, compute.array_dtype)
    readout = Readout(head, draw, num_choices=num_choices)
    outputs_fn = make_outputs(ForwardParts(model, readout, rules, layout, compute), layout)
    constrain = make_constrain(rules, layout)

    def inference(params: Tree, batch: Batch) -> Mapping[str, Array]:
        params = compute_copy(params)
        if num_mbs == 1:
            outputs, _ = outputs_fn(params, batch)
        else:
            of_part = lambda part: outputs_fn(params, part)[0]
            outputs = join_rows(jax.lax.map(of_part, deal_rows(batch, num_mbs)))
        dims = lambda output: (*PER_TOKEN, "choices")[: output.ndim]
        return {name: constrain(output, dims(output)) for name, output in outputs.items()}

    return inference


def make_evaluation(
    model: Model, loss: Loss, layout: Layout, compute: Compute, num_mbs: int = 1
) -> Callable[[Tree, Batch], LossSums]:
    """Returns `fn(params, batch) -> sums` of the loss, computed in `num_mbs` parts; add them over batches, then divide
    once. Terms that layers add to the loss in training are reported beside it.
    """
    rules, compute = inference_rules(layout.strategy), replace(compute, remat=False)
    compute_copy = make_compute_copy(model, rules, layout, compute.array_dtype, optimizer_rules(layout.strategy))
    parts = ForwardParts(model, loss.readout, rules, layout, compute)
    outputs_fn = make_outputs(parts, layout)

    def evaluation(params: Tree, batch: Batch) -> LossSums:
        params = compute_copy(params)

        def of_part(part: Batch) -> LossSums:
            outputs, terms = outputs_fn(params, part)
            return loss.fn(outputs, part).with_terms(terms, shares={})

        if num_mbs == 1:
            return of_part(batch)
        sums = jax.lax.map(of_part, deal_rows(batch, num_mbs))
        return jax.tree.map(lambda parts: jnp.sum(parts, axis=0), sums)

    return evaluation
