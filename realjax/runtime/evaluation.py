"""Held-out measurements: the mean of a loss, or what a model's own answers to held-out prompts are worth."""

from collections.abc import Mapping

import numpy as np

from realjax.core.batch import Batch
from realjax.core.loss import LossSums
from realjax.core.metrics import Metric, summarize
from realjax.data.packing import unpack
from realjax.dataflow.graph import HostCall
from realjax.dataflow.run import DecodeFn, Evaluation, RolloutEvaluation
from realjax.record.samples import Sample
from realjax.reshard.fetch import fetch
from realjax.runtime.executor import Executor

MOST_SAMPLES = 4


def evaluate_loss(executor: Executor, evaluation: Evaluation) -> dict[str, float]:
    """Returns the held-out loss and its metrics, of sums over all batches divided once."""
    loader = evaluation.loader
    sums: list[LossSums] = [fetch(executor.evaluate(evaluation, loader.batch(i))) for i in range(loader.total_steps)]
    return summarize({"loss": part.loss, **part.metrics} for part in sums)


def evaluate_rollouts(
    executor: Executor, evaluation: RolloutEvaluation, decode_fn: DecodeFn | None
) -> tuple[dict[str, float], list[Sample]]:
    """Returns `<variant>/<metric>`, each of the answers to all held-out prompts, and a few answers."""
    values: dict[str, float] = {}
    samples: list[Sample] = []
    for variant, calls in evaluation.variants.items():
        parts: list[Mapping[str, Metric]] = []
        for i in range(evaluation.loader.total_steps):
            result = executor.run_calls(calls, evaluation.loader.batch(i), step=None)
            parts += [m for call in calls if isinstance(call, HostCall) for m in result.metrics[call.name]]
            if i == 0 and decode_fn is not None:
                samples += read_samples(result.batch, decode_fn, variant)
        values |= {f"{variant}/{name}": value for name, value in summarize(parts).items()}
    return values, samples


def read_samples(rollout: Batch, decode_fn: DecodeFn, variant: str) -> list[Sample]:
    """Returns the texts of a rollout's first prompts, in the order of their numbers."""
    keys = [key for key in ("tokens", "loss_mask", "rewards", "group", "segment_ids", "positions") if key in rollout]
    sequences = sorted(unpack(rollout.select(keys)), key=lambda sequence: int(sequence["group"]))
    sequences = sequences[:MOST_SAMPLES]
    prompts, answers = (
        [sequence["tokens"][sequence["loss_mask"] == is_answer].tolist() for sequence in sequences]
        for is_answer in (False, True)
    )
    return [
        Sample(variant=variant, prompt=prompt, answer=answer, reward=float(sequence.get("rewards", np.float32(np.nan))))
        for sequence, prompt, answer in zip(sequences, *decode_fn(prompts, answers), strict=True)
    ]
