"""KTO (arXiv:2402.01306): answers that are desirable or not, each compared with the actor's KL to the reference.

The KL of a batch is estimated before the update, from other sequences: its prompts with answers to others of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.host_call import Arrays, HostResult, State
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Last, Mean, Total
from realjax.core.option import check_ranges, option
from realjax.core.segments import segment_mask, spread_to_tokens, sum_by_segment

KL_INPUTS = ("loss_mask", "is_other", "old_logprobs", "ref_logprobs")
KL_OUTPUTS = ("train_mask", "kl_baseline")
KTO_INPUTS = ("tokens", "train_mask", "desirable", "kl_baseline", "ref_logprobs")


@dataclass(frozen=True, kw_only=True)
class KTOParameters:
    """KTO's parameters. Raises ValueError for values outside their range."""

    beta: float = option(0.1, "strength of the pull towards the reference", above=0)
    desirable_weight: float = option(1.0, "weight of desirable answers", above=0)
    undesirable_weight: float = option(1.0, "weight of undesirable answers", above=0)

    def __post_init__(self) -> None:
        check_ranges(self)


def estimate_kl_baseline(arrays: Arrays, state: State) -> HostResult:
    """Returns `kl_baseline` `[R, S]`, the mean log-ratio of actor to reference of the other sequences in float64, or 0
    where it is below; and `train_mask` `[R, T]`, the answers' own tokens.

    Reads `loss_mask`, `old_logprobs`, `ref_logprobs` `[R, T]` and `is_other` `[R, S]`.
    """
    (result,) = estimate_kl_baselines([arrays])
    return result


def estimate_kl_baselines(parts: Sequence[Arrays]) -> list[HostResult]:
    """Returns the same of each of the parts of a set, with the mean over all of it."""
    total, count = 0.0, 0
    masks = []
    for arrays in parts:
        segment_ids = arrays["segment_ids"]
        is_other = arrays["is_other"] & segment_mask(segment_ids, arrays["is_other"].shape[1])
        of_token, is_answer = spread_to_tokens(is_other, segment_ids) > 0, arrays["loss_mask"].astype(bool)
        masks.append(is_answer & ~of_token & (segment_ids > 0))
        actor, reference = (arrays[key][is_answer & of_token].astype(np.float64) for key in KL_INPUTS[2:])
        total, count = total + float((actor - reference).sum()), count + np.count_nonzero(is_other)
    kl = max(0.0, total / max(1, count))
    baselines = [np.full(arrays["is_other"].shape, kl, np.float32) for arrays in parts]
    return [
        HostResult(arrays={"train_mask": mask, "kl_baseline": baseline}, metrics={"kl": Last(kl)})
        for mask, baseline in zip(masks, baselines, strict=True)
    ]


def kto_loss(outputs: Mapping[str, Array], batch: Batch, *, parameters: KTOParameters) -> LossSums:
    """Returns weight (1 - sigmoid(+-beta (log-ratio - KL))) summed over answers with a token in `train_mask`
    (section 4.1), + for desirable ones.

    Reads `train_mask`, `ref_logprobs` `[R, T]`, and `desirable`, `kl_baseline` `[R, S]`.
    """
    mask, segment_ids = batch["train_mask"].astype(bool), batch["segment_ids"]
    select = lambda x: jnp.where(mask, x, 0)
    sums = lambda x: sum_by_segment(x, segment_ids, batch["desirable"].shape[1])
    log_ratio = sums(select(outputs["logprobs"]) - select(batch["ref_logprobs"]))
    is_answer = sums(mask.astype(jnp.float32)) > 0
    desirable = (batch["desirable"] > 0) & is_answer
    h = parameters.beta * (log_ratio - batch["kl_baseline"])
    weights = jnp.where(desirable, parameters.desirable_weight, parameters.undesirable_weight)
    losses = weights * (1 - jax.nn.sigmoid(jnp.where(desirable, h, -h)))
    scores = parameters.beta * log_ratio
    undesirable = is_answer & ~desirable
    count = lambda among: jnp.sum(among.astype(jnp.float32))
    mean = lambda x, among: Mean(jnp.sum(jnp.where(among, x, 0)), count(among))
    return LossSums(
        loss=mean(losses, is_answer),
        metrics={
            "pos_score": mean(scores, desirable),
            "neg_score": mean(scores, undesirable),
            "acc": mean((h > 0) == desirable, is_answer),
            "n_desirable": Total(count(desirable)),
            "n_undesirable": Total(count(undesirable)),
        },
    )


def make_kto_loss(parameters: KTOParameters, draw: Draw = Draw()) -> Loss:  # noqa: B008 - frozen
    """Returns the loss that these parameters describe, of log-probabilities under `draw`."""
    return Loss(head="logprobs", fn=partial(kto_loss, parameters=parameters), draw=draw)
