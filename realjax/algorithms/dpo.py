"""Direct preference optimisation (arXiv:2305.18290), with label smoothing, IPO and a reference-free variant."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from realjax.algorithms.pairs import mean_over_pairs, score_metrics, sum_by_pair
from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.loss import Loss, LossSums
from realjax.core.option import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class DPOParameters:
    """`sigmoid`: -log sigmoid(beta h), labels smoothed (cDPO); `ipo`: (h - 1/(2 beta))^2 on mean log-ratios
    (arXiv:2310.12036). h is the better answer's log-ratio to the reference minus the worse one's. Raises ValueError for
    smoothed labels with `ipo`, whose loss has none."""

    beta: float = option(0.1, "strength of the pull towards the reference", above=0)
    loss_type: Literal["sigmoid", "ipo"] = option("sigmoid", "sigmoid: DPO. ipo: squared loss on mean log-ratios")
    label_smoothing: float = option(
        0.0, "share of pairs taken to be labelled the wrong way round", at_least=0, below=0.5
    )
    reference_free: bool = option(False, "compare with a uniform reference; the ref model is then not used")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.loss_type == "ipo" and self.label_smoothing > 0:
            raise ValueError(
                f"label_smoothing: found {self.label_smoothing} with loss_type=ipo, whose loss has no labels to "
                "smooth; set it to 0, or loss_type to sigmoid"
            )


def dpo_loss(outputs: Mapping[str, Array], batch: Batch, *, parameters: DPOParameters) -> LossSums:
    """Returns the loss summed over pairs. Log-ratios are sums over an answer's tokens, for IPO means; so are metrics of
    them, but for `kl`, which is of sums.

    Reads `loss_mask`, `ref_logprobs` `[R, T]` (unless reference-free) and `pair_weight` `[R, P]`.
    """
    mask, segment_ids = batch["loss_mask"].astype(jnp.float32), batch["segment_ids"]
    num_slots = batch["pair_weight"].shape[1]
    is_pair = batch["pair_weight"] > 0
    reference = 0.0 if parameters.reference_free else batch["ref_logprobs"]
    better, worse = sum_by_pair((outputs["logprobs"] - reference) * mask, segment_ids, num_slots)
    kl = -(better + worse)
    if parameters.loss_type == "ipo":
        counts = sum_by_pair(mask, segment_ids, num_slots)
        better, worse = better / jnp.maximum(counts[0], 1), worse / jnp.maximum(counts[1], 1)
        losses = jnp.square(better - worse - 1 / (2 * parameters.beta))
    else:
        h = parameters.beta * (better - worse)
        smoothing = parameters.label_smoothing
        losses = -(1 - smoothing) * jax.nn.log_sigmoid(h) - smoothing * jax.nn.log_sigmoid(-h)
    scores = score_metrics(parameters.beta * better, parameters.beta * worse, is_pair)
    return LossSums(loss=mean_over_pairs(losses, is_pair), metrics={**scores, "kl": mean_over_pairs(kl, is_pair)})


def make_dpo_loss(parameters: DPOParameters, draw: Draw = Draw()) -> Loss:  # noqa: B008 - frozen
    """Returns the loss that these parameters describe, of log-probabilities under `draw`."""
    return Loss(head="logprobs", fn=partial(dpo_loss, parameters=parameters), draw=draw)
