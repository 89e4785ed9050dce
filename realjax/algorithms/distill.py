"""Distillation (arXiv:2306.13649): at each token of an answer, how far a student's distribution is from a teacher's.

The answers are the student's own, the data's, or some of each. A teacher's distribution is kept as its K likeliest
tokens and the probability of all others together, and both distributions are compared over these K + 1 outcomes. So the
divergence is 0 where both agree, and grows with what the student gives to tokens outside of the K, which distributions
renormalised over the K would not see. It is never above the divergence over all tokens, and equal where K is all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array

from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.loss import CompareFn, Loss, LossSums
from realjax.core.metrics import Mean, Total
from realjax.core.option import check_ranges, option

DISTILL_INPUTS = ("tokens", "loss_mask", "teacher_ids", "teacher_logprobs")


@dataclass(frozen=True, kw_only=True)
class DistillParameters:
    """How student and teacher are compared. Raises ValueError for values outside their range."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        "reverse_kl",
        "forward_kl: KL(teacher, student), which covers all that the teacher may say. reverse_kl: KL(student, "
        "teacher), which keeps to what it would say. jsd: both to a mixture of the two",
    )
    beta: float = option(0.5, "share of the teacher in jsd's mixture, and weight of its KL", above=0, below=1)
    top_k: int | None = option(
        64,
        "the teacher's likeliest tokens that are told apart; all others count as one. null: all tokens, which takes "
        "8 bytes for each token of the vocabulary and of a step's answers",
        at_least=1,
    )
    temperature: float = option(1.0, "logits of both are divided by it before they are compared", above=0)

    def __post_init__(self) -> None:
        check_ranges(self)


def make_compare(parameters: DistillParameters) -> CompareFn:
    """Returns the terms of the divergence, as functions of log p of the teacher and log q of the student."""
    if parameters.divergence == "forward_kl":
        return _kl_terms
    if parameters.divergence == "reverse_kl":
        return lambda log_p, log_q: _kl_terms(log_q, log_p)
    beta = parameters.beta

    def compare(log_p: Array, log_q: Array) -> Array:
        mixed = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * _kl_terms(log_p, mixed) + (1 - beta) * _kl_terms(log_q, mixed)

    return compare


def _kl_terms(log_p: Array, log_q: Array) -> Array:
    return jnp.exp(log_p) * (log_p - log_q)


def distill_loss(outputs: Mapping[str, Array], batch: Batch) -> LossSums:
    """Returns the divergence summed over the answers' tokens; the metric `nll` is that of the tokens under the student.

    `teacher_rest` is the mean probability that the teacher gives to all but its K likeliest tokens. Reads `loss_mask`
    `[R, T]` and `teacher_logprobs` `[R, T, K + 1]`.
    """
    mask = batch["loss_mask"].astype(bool)
    num_tokens = jnp.sum(mask.astype(jnp.float32))
    mean = lambda x: Mean(jnp.sum(jnp.where(mask, x, 0)), num_tokens)
    metrics = {
        "nll": mean(-outputs["logprobs"]),
        "teacher_rest": mean(jnp.exp(batch["teacher_logprobs"][..., -1])),
        "n_tokens": Total(num_tokens),
    }
    return LossSums(loss=mean(outputs["divergence"]), metrics=metrics)


def make_distill_loss(parameters: DistillParameters, num_tokens: int) -> Loss:
    """Returns the loss that these parameters describe, over the first `num_tokens` rows of both heads."""
    return Loss(
        head="logprobs", fn=distill_loss, draw=make_draw(parameters, num_tokens), compare_fn=make_compare(parameters)
    )


def make_draw(parameters: DistillParameters, num_tokens: int) -> Draw:
    """Returns the distribution of either model that is compared."""
    return Draw(temperature=parameters.temperature, num_tokens=num_tokens)
