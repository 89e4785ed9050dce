"""KTO (arXiv:2402.01306): answers that are desirable or not, each compared with the actor's KL to the reference.

The KL of a batch is estimated before the update: its pairs are a prompt's answer and, to the same prompt, the answer to
another one. The second is only there for the KL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.algorithms.pairs import mean_over_pairs, sum_by_pair
from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.host_call import Arrays, HostResult, State
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Last, Total
from realjax.core.option import check_ranges, option

KL_INPUTS = ("loss_mask", "pair_weight", "old_logprobs", "ref_logprobs")


@dataclass(frozen=True, kw_only=True)
class KTOParameters:
    """KTO's parameters. Raises ValueError for values outside their range."""

    beta: float = option(0.1, "strength of the pull towards the reference", above=0)
    desirable_weight: float = option(1.0, "weight of desirable answers", above=0)
    undesirable_weight: float = option(1.0, "weight of undesirable answers", above=0)

    def __post_init__(self) -> None:
        check_ranges(self)


def estimate_kl_baseline(arrays: Arrays, state: State) -> HostResult:
    """Returns `kl_baseline` `[R, P]`: for all pairs the mean log-ratio of actor to reference of the second answers, in
    float64, or 0 where it is below.

    Reads `loss_mask`, `old_logprobs`, `ref_logprobs` `[R, T]` and `pair_weight` `[R, P]`.
    """
    segment_ids, is_pair = arrays["segment_ids"], arrays["pair_weight"] > 0
    is_second = arrays["loss_mask"].astype(bool) & (segment_ids > 0) & (segment_ids % 2 == 0)
    actor, reference = (arrays[key][is_second].astype(np.float64) for key in ("old_logprobs", "ref_logprobs"))
    kl = max(0.0, float((actor - reference).sum()) / max(1, np.count_nonzero(is_pair)))
    return HostResult(arrays={"kl_baseline": np.where(is_pair, kl, 0).astype(np.float32)}, metrics={"kl": Last(kl)})


def kto_loss(outputs: Mapping[str, Array], batch: Batch, *, parameters: KTOParameters) -> LossSums:
    """Returns weight (1 - sigmoid(+-beta (log-ratio - KL))) summed over the first answers of pairs (section 4.1), + for
    desirable ones.

    Reads `loss_mask`, `ref_logprobs` `[R, T]`, and `pair_weight`, `desirable`, `kl_baseline` `[R, P]`.
    """
    mask, is_pair = batch["loss_mask"].astype(bool), batch["pair_weight"] > 0
    select = lambda x: jnp.where(mask, x, 0)
    ratios = select(outputs["logprobs"]) - select(batch["ref_logprobs"])
    log_ratio, _ = sum_by_pair(ratios, batch["segment_ids"], is_pair.shape[1])
    desirable = (batch["desirable"] > 0) & is_pair
    h = parameters.beta * (log_ratio - batch["kl_baseline"])
    weights = jnp.where(desirable, parameters.desirable_weight, parameters.undesirable_weight)
    losses = weights * (1 - jax.nn.sigmoid(jnp.where(desirable, h, -h)))
    scores = parameters.beta * log_ratio
    undesirable = is_pair & ~desirable
    return LossSums(
        loss=mean_over_pairs(losses, is_pair),
        metrics={
            "pos_score": mean_over_pairs(scores, desirable),
            "neg_score": mean_over_pairs(scores, undesirable),
            "acc": mean_over_pairs((h > 0) == desirable, is_pair),
            "n_desirable": Total(jnp.sum(desirable.astype(jnp.float32))),
            "n_undesirable": Total(jnp.sum(undesirable.astype(jnp.float32))),
        },
    )


def make_kto_loss(parameters: KTOParameters, draw: Draw = Draw()) -> Loss:  # noqa: B008 - frozen
    """Returns the loss that these parameters describe, of log-probabilities under `draw`."""
    return Loss(head="logprobs", fn=partial(kto_loss, parameters=parameters), draw=draw)
