"""Programs for shapes that are still to come, compiled at the start of a run."""

from collections.abc import Iterator

import numpy as np

from realjax.core.axes import train_rules
from realjax.core.batch import Batch
from realjax.data.loader import Loader
from realjax.dataflow.graph import Generate, Inference, Train
from realjax.engine.compiled import abstract_batch
from realjax.runtime.calls import select_inputs
from realjax.runtime.executor import Executor
from realjax.runtime.programs import num_micro_batches


def compile_shapes(executor: Executor, loader: Loader, steps: range) -> None:
    """Compiles the model calls for every number of rows that the loader's batches have in these steps.

    So no later step waits for it. Where rows follow from what is drawn nothing is known before.
    """
    if any(isinstance(call, Generate) for call in executor.graph.calls):
        return
    for num_rows in np.unique(loader.shapes.num_rows[steps.start : steps.stop]):
        step = steps.start + int(np.argmax(loader.shapes.num_rows[steps.start :] == num_rows))
        _compile_calls(executor, loader.batch(step))


def _compile_calls(executor: Executor, batch: Batch) -> None:
    for call in _list_calls(executor):
        inputs, layout = select_inputs(call, batch), executor.plan.layouts[call.name]
        num_mbs = num_micro_batches(call, inputs, layout)
        placed = abstract_batch(inputs, train_rules(layout.strategy), layout)
        if isinstance(call, Train):
            program = executor.programs.train_step(call, num_mbs)
            program.prepare(executor.states[call.role], placed, *executor.base_for(call.role))
        else:
            executor.programs.inference(call, num_mbs).prepare(executor.abstract_params_for(call), placed)
            batch = batch.with_arrays(**{key: np.zeros(batch["tokens"].shape, np.float32) for key in call.outputs})


def _list_calls(executor: Executor) -> Iterator[Inference | Train]:
    """Yields the calls up to one whose inputs the host makes, or that computes some of the sequences alone."""
    for call in executor.graph.order:
        if (isinstance(call, Inference) and call.only is None) or (
            isinstance(call, Train) and call.minibatches is None
        ):
            yield call
        else:
            return
