"""Supervised fine-tuning: the negative log-likelihood of the answers' tokens."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from realjax.core.batch import Batch
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean, Total
from realjax.core.segments import sum_by_segment


def sft_loss(outputs: Mapping[str, Array], batch: Batch) -> LossSums:
    """Returns the nll summed over answer tokens; metrics `ppl`, `n_tokens` and `n_seqs`.

    Perplexity is exp(mean nll) of each sequence, averaged over the sequences that have a target token.
    """
    mask, segment_ids = batch["loss_mask"].astype(jnp.float32), batch["segment_ids"]
    # A row of T tokens holds at most T sequences; the empty ones have no target and drop out.
    nll = sum_by_segment(-outputs["logprobs"] * mask, segment_ids, mask.shape[1])
    num_targets = sum_by_segment(mask, segment_ids, mask.shape[1])
    has_target = num_targets > 0
    ppl = jnp.where(has_target, jnp.exp(nll / jnp.maximum(num_targets, 1)), 0)
    num_seqs, num_tokens = jnp.sum(has_target.astype(jnp.float32)), jnp.sum(mask)
    return LossSums(
        loss=Mean(outputs["nll"], num_tokens),
        metrics={"ppl": Mean(jnp.sum(ppl), num_seqs), "n_tokens": Total(num_tokens), "n_seqs": Total(num_seqs)},
    )


SFT_LOSS = Loss(head="nll", fn=sft_loss)
