"""Held-out measurements: the mean of a loss, or what a model's own answers to held-out prompts are worth."""

from collections.abc import Mapping

import numpy as np

from realjax.core.batch import Batch
from realjax.core.loss import LossSums
from realjax.core.metrics import Metric, summarize
from realjax.data.loader import Loader
from realjax.dataflow.graph import Host
from realjax.dataflow.run import DecodeFn, Evaluation, RolloutEvaluation
from realjax.record.answers import read_texts
from realjax.record.samples import Sample
from realjax.reshard.fetch import fetch
from realjax.runtime.executor import Executor

MOST_SAMPLES = 4


def evaluate_loss(executor: Executor, evaluation: Evaluation, loader: Loader) -> dict[str, float]:
    """Returns the held-out loss and its metrics, of sums over all batches of the loader divided once."""
    sums: list[LossSums] = [fetch(executor.evaluate(evaluation, loader.batch(i))) for i in range(loader.total_steps)]
    return summarize({"loss": part.loss, **part.metrics} for part in sums)


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
