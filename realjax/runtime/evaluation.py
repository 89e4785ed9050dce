"""Held-out measurements: the mean of a loss, or what a model's own answers to held-out prompts are worth."""

from collections.abc import Mapping

import numpy as np

from realjax.core.batch import Batch
from realjax.core.loss import LossSums
from realjax.core.metrics import Metric, summarize
from realjax.data.loader import Loader
from realjax.dataflow.graph import Host, Inference
from realjax.dataflow.run import DecodeFn, Evaluation, RolloutEvaluation
from realjax.record.answers import read_texts
from realjax.record.samples import Sample
from realjax.reshard.fetch import fetch
from realjax.runtime.calls import read_arrays
from realjax.runtime.executor import Executor

MOST_SAMPLES = 4


def evaluate_loss(executor: Executor, evaluation: Evaluation, loader: Loader) -> dict[str, float]:
    """Returns the held-out loss and its metrics, of sums over all batches of the loader divided once."""
    steps, parts = range(loader.total_steps), list[Mapping[str, Metric]]()
    pools = any(isinstance(call, Host) and call.pool_fn is not None for call in evaluation.calls)
    # One batch after the other, unless a call wants to see them all.
    for batches in [[loader.batch(i) for i in steps]] if pools else ([loader.batch(i)] for i in steps):
        for call in evaluation.calls:
            batches, metrics = _run_on_all(executor, call, batches)
            parts += metrics
        sums: list[LossSums] = [fetch(executor.evaluate(evaluation, batch)) for batch in batches]
        parts += [{"loss": one.loss, **one.metrics} for one in sums]
    return summarize(parts)


def _run_on_all(
    executor: Executor, call: Inference | Host, batches: list[Batch]
) -> tuple[list[Batch], list[Mapping[str, Metric]]]:
    """Returns the batches after a call, and what it reports."""
    if not isinstance(call, Host) or call.pool_fn is None:
        results = [executor.step(batch, None, [call]) for batch in batches]
        return [one.batch for one in results], [m for one in results for m in one.metrics.get(call.name, ())]
    arrays = [read_arrays(batch, call) for batch in batches]
    found = call.pool_fn(arrays)
    return (
        [batch.with_arrays(**one.arrays) for batch, one in zip(batches, found, strict=True)],
        [one.metrics for one in found],
    )


def evaluate_rollouts(
    executor: Executor, evaluation: RolloutEvaluation, loader: Loader, decode_fn: DecodeFn | None
) -> tuple[dict[str, float], list[Sample]]:
    """Returns `<variant>/<metric>`, each of the answers to all of the loader's prompts, and a few answers."""
    values: dict[str, float] = {}
    samples: list[Sample] = []
    for variant, calls in evaluation.variants.items():
        parts: list[Mapping[str, Metric]] = []
        for i in range(loader.total_steps):
            result = executor.step(loader.batch(i), None, calls)
            parts += [m for call in calls if isinstance(call, Host) for m in result.metrics[call.name]]
            if i == 0 and decode_fn is not None:
                samples += read_samples(result.batch, decode_fn, variant)
        values |= {f"{variant}/{name}": value for name, value in summarize(parts).items()}
    return values, samples


def read_samples(rollout: Batch, decode_fn: DecodeFn, variant: str) -> list[Sample]:
    """Returns the texts of a rollout's first prompts, in the order of their numbers."""
    return [
        Sample(
            variant=variant,
            prompt=answer.prompt,
            answer=answer.text,
            reward=float(answer.arrays.get("rewards", np.float32(np.nan))),
        )
        for answer in read_texts(rollout, decode_fn, MOST_SAMPLES)
    ]
