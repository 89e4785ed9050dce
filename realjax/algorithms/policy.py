"""The policy loss that all algorithms share which learn from rewards of their own answers, and its options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from realjax.algorithms.corrections import CorrectionParameters
from realjax.algorithms.kl import MAX_EXPONENT, Estimator, estimate_kl
from realjax.core.batch import Batch
from realjax.core.draw import Draw
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean, Total
from realjax.core.option import check_conditions, check_ranges, nested, option
from realjax.core.segments import spread_to_tokens, sum_by_segment

Aggregation = Literal["token", "sequence", "constant"]
Surrogate = Literal["clip", "reinforce", "gspo", "gspo_token", "cispo"]


@dataclass(frozen=True, kw_only=True)
class PolicyParameters:
    """What the algorithms of this family have in common. Raises ValueError for values outside their range."""

    kl_ctl: float = option(0.1, "coefficient of the KL to the reference; 0: no reference model is needed", at_least=0)
    kl_in: Literal["reward", "loss"] = option("reward", "reward: the KL is subtracted from rewards. loss: a term of it")
    kl_estimator: Estimator = option("k1", "d, d^2/2 or exp(-d)-1+d per token, d = logprob - reference logprob")
    use_adaptive_kl_ctl: bool = option(False, "steer kl_ctl so that the KL approaches adaptive_kl_target")
    adaptive_kl_target: float = option(
        6.0,
        "KL that the controller aims at: nats per response, summed over its tokens; the mean over responses counts",
        above=0,
    )
    adaptive_kl_horizon: float = option(10000.0, "sequences over which kl_ctl may change by a fifth", above=0)
    discount: float = option(1.0, "discount of rewards, per token", above=0, at_most=1)
    max_reward_clip: float = option(20.0, "scores are clipped to +-max_reward_clip", above=0)
    missing_eos_penalty: float | None = option(
        None,
        "subtracted from the score of a response cut off at max_new_tokens; null: it is scored as any other",
    )
    adv_norm: bool = option(True, "whiten advantages over the whole batch")
    surrogate: Surrogate = option(
        "clip",
        "clip: PPO's clipped probability ratio. reinforce: the plain policy gradient, without a ratio. gspo: as clip, "
        "with the geometric mean of a response's ratios. gspo_token: the same, but each token has a gradient of its "
        "own advantage. cispo: the plain policy gradient times the clipped ratio, a constant",
    )
    eps_clip: float = option(0.2, "the ratio counts up to 1 - eps_clip below and 1 + eps_clip above", above=0, below=1)
    eps_clip_high: float | None = option(
        None, "clip-higher: the upper bound is 1 + eps_clip_high. null: eps_clip", above=0
    )
    dual_clip: float | None = option(
        None, "where the advantage is negative the ratio counts up to this. null: no limit", above=1
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus", at_least=0)
    loss_aggregation: Aggregation = option(
        "token",
        "token: mean over the tokens learned from. sequence: mean over sequences of their means over tokens. constant: "
        "sum over tokens by the number of sequences times max_response_len; in these two, sequences that are left out "
        "count, so that leaving some out changes nothing for the others",
    )
    max_response_len: int | None = option(None, "tokens of the longest response. null: gen.max_new_tokens", above=0)
    early_stop_imp_ratio: float | None = option(
        5.0, "updates whose mean ratio is above it are skipped. null: none", above=0
    )
    early_stop_kl: float | None = option(
        None, "updates whose KL to the old policy is above it are skipped. null: none", above=0
    )
    recompute_logprobs: bool | None = option(
        None,
        "take the old log-probabilities from a pass of the actor over whole sequences, not from the sampler. null: "
        "with staleness above 0 or a correction",
    )
    correction: CorrectionParameters = nested(CorrectionParameters)

    # Of the host call that makes advantages: the keys that only this algorithm reads, and the keys that it writes.
    JUDGED_BY: ClassVar[tuple[str, ...]] = ("group",)
    ADVANTAGE_OUTPUTS: ClassVar[tuple[str, ...]] = ("advantages", "train_mask", "seq_share")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_conditions(
            self,
            use_adaptive_kl_ctl=(
                not self.use_adaptive_kl_ctl or (self.kl_in == "reward" and self.kl_ctl > 0),
                "False with kl_in=loss, whose coefficient is fixed, and with kl_ctl=0, which no factor changes",
            ),
        )
        if self.correction.is_on and not self.recomputes:
            name = "kind" if self.correction.kind in ("tis", "mis") else "reject_above"
            raise ValueError(
                f"correction.{name}: found {getattr(self.correction, name)} with recompute_logprobs=False, where the "
                "sampler's log-probabilities are those that training starts from, and nothing is to be corrected; set "
                f"recompute_logprobs to True or null, or leave {name} out"
            )

    @property
    def recomputes(self) -> bool:
        """Whether the actor's own log-probabilities are there beside the sampler's."""
        return self.correction.is_on if self.recompute_logprobs is None else self.recompute_logprobs

    @property
    def old_logprobs(self) -> str:
        """The key of the log-probabilities that the ratio and the KL in the reward start from."""
        return "old_logprobs" if self.recomputes else "logprobs"

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logprobs` are read."""
        return self.kl_ctl > 0

    @property
    def has_kl_loss(self) -> bool:
        """Whether the KL to the reference is a term of the loss."""
        return self.needs_reference and self.kl_in == "loss"

    @property
    def advantage_inputs(self) -> tuple[str, ...]:
        """The keys that the host call of advantages reads."""
        reference = ("ref_logprobs",) if self.needs_reference else ()
        rewards = ("has_eos", "rewards", "is_failed")
        return tuple(dict.fromkeys(("loss_mask", "logprobs", self.old_logprobs, *rewards, *reference, *self.JUDGED_BY)))

    @property
    def actor_inputs(self) -> tuple[str, ...]:
        """The keys that the actor's training call reads, beside those of its `Draw`."""
        reference = ("ref_logprobs",) if self.has_kl_loss else ()
        share = () if self.loss_aggregation == "token" else ("seq_share",)
        correction = ("correction",) if self.correction.is_on else ()
        return ("tokens", "train_mask", "advantages", self.old_logprobs, *reference, *share, *correction)


def make_policy_loss(parameters: PolicyParameters, draw: Draw = Draw()) -> Loss:  # noqa: B008 - frozen
    """Returns the actor's loss for tokens drawn from `draw`. Raises ValueError where a length is missing."""
    if parameters.loss_aggregation == "constant" and parameters.max_response_len is None:
        raise ValueError("max_response_len: found null; loss_aggregation=constant divides by it: set it")
    return Loss(
        head="logprobs",
        fn=partial(policy_loss, parameters=parameters),
        draw=draw,
        needs_entropy=parameters.entropy_coef > 0,
        skip_fn=make_skip(parameters),
    )


def make_skip(parameters: PolicyParameters) -> Callable[[Mapping[str, Array]], Array] | None:
    """Returns whether an update is to be skipped, given its global metrics; None where none ever is."""
    limits = {
        "importance_weight": parameters.early_stop_imp_ratio,
        "approx_kl": parameters.early_stop_kl,
    }
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if not limits:
        return None
    return lambda metrics: jnp.any(jnp.stack([metrics[name] > limit for name, limit in limits.items()]))


def policy_loss(outputs: Mapping[str, Array], batch: Batch, *, parameters: PolicyParameters) -> LossSums:
    """Returns the policy loss (arXiv:1707.06347 eq. 7), the KL and the entropy bonus, summed with `token_weights`.

    Reads `train_mask`, `advantages`, the old log-probabilities and, for a KL in the loss, `ref_logprobs`, all `[R, T]`;
    `seq_share` `[R, S]` where sequences count; and `correction` `[R, T]`, which weighs the surrogate alone. Tokens that
    it leaves out add nothing, but the loss is divided as if they did, so that the others weigh what they weighed.
    Metrics are means over tokens learned from but for `actor_loss`, which is aggregated as the loss. `ppo_approx_kl` is
    the mean of logprob - old logprob, `approx_kl` estimates KL(old || new) by k3 and is never negative.
    """
    mask, correction = batch["train_mask"], None
    weights, total = token_weights(batch, parameters.loss_aggregation, max_response_len=parameters.max_response_len)
    if parameters.correction.is_on:
        correction = jnp.where(mask, batch["correction"], 0)
        mask = correction > 0
    # Selected before any arithmetic: whatever stands at other tokens, nan included, reaches neither sums nor gradients.
    select = lambda x: jnp.where(mask, x, 0)
    logprobs, old = select(outputs["logprobs"]), select(batch[parameters.old_logprobs])
    advantages = select(batch["advantages"])
    num_tokens = jnp.sum(mask.astype(jnp.float32))
    mean = lambda x: Mean(jnp.sum(select(x).astype(jnp.float32)), num_tokens)

    log_ratio = logprobs - old
    if parameters.surrogate in ("gspo", "gspo_token"):
        log_ratio = _of_responses(
            log_ratio, mask, batch["segment_ids"], own_gradient=parameters.surrogate == "gspo_token"
        )
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_EXPONENT, MAX_EXPONENT))
    losses, metrics = _surrogate(ratio, logprobs, advantages, parameters)
    metrics |= {
        "importance_weight": ratio,
        "ppo_approx_kl": logprobs - old,
        "approx_kl": estimate_kl(old, logprobs, "k3"),
    }
    if correction is not None:
        losses *= correction
    actor_loss = jnp.sum(weights * losses)
    if parameters.has_kl_loss:
        metrics["kl_loss"] = estimate_kl(logprobs, select(batch["ref_logprobs"]), parameters.kl_estimator)
        losses += parameters.kl_ctl * metrics["kl_loss"]
    if parameters.entropy_coef > 0:
        metrics["entropy"] = select(outputs["entropy"])
        losses -= parameters.entropy_coef * metrics["entropy"]
    return LossSums(
        loss=Mean(jnp.sum(weights * losses), total),
        metrics={name: mean(values) for name, values in metrics.items()}
        | {"actor_loss": Mean(actor_loss, total), "n_tokens": Total(num_tokens)},
    )


def token_weights(
    batch: Batch, aggregation: Aggregation, *, max_response_len: int | None = None
) -> tuple[Array, Array]:
    """Returns the weight `[R, T]` of each token in the loss, 0 off the mask, and what the weighted sum is divided by.

    `sequence` is GRPO's (arXiv:2402.03300 eq. 3: 1/G sum_i 1/|o_i| sum_t) and `constant` Dr. GRPO's (2503.20783), both
    over all of a prompt's G samples: `seq_share` counts those that are left out. `token` is DAPO's (2503.14476 eq. 8),
    which samples others in their place: only tokens learned from count.
    """
    weights, segment_ids = batch["train_mask"].astype(jnp.float32), batch["segment_ids"]
    if aggregation == "token":
        return weights, jnp.sum(weights)
    num_seqs = jnp.sum(batch["seq_share"])
    if aggregation == "constant":
        return weights, num_seqs * (max_response_len or 1)
    # A row of T tokens holds at most T sequences.
    lens = sum_by_segment(weights, segment_ids, weights.shape[1])
    return weights / jnp.maximum(spread_to_tokens(lens, segment_ids), 1), num_seqs


def _of_responses(log_ratio: Array, mask: Array, segment_ids: Array, *, own_gradient: bool) -> Array:
    """Returns for each token `[R, T]` the mean over its response's tokens (arXiv:2507.18071 eq. 7).

    With `own_gradient` it changes with the token's own log-probability alone, at a rate of 1 (eq. 14).
    """
    sums = lambda x: spread_to_tokens(sum_by_segment(x, segment_ids, x.shape[1]), segment_ids)
    means = sums(log_ratio) / jnp.maximum(sums(mask.astype(jnp.float32)), 1)
    return jax.lax.stop_gradient(means - log_ratio) + log_ratio if own_gradient else means


def _surrogate(
    ratio: Array, logprobs: Array, advantages: Array, parameters: PolicyParameters
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of each token, and which tokens were clipped."""
    if parameters.surrogate == "reinforce":
        return -advantages * logprobs, {}
    eps_high = parameters.eps_clip if parameters.eps_clip_high is None else parameters.eps_clip_high
    low, high = 1 - parameters.eps_clip, 1 + eps_high
    # Clipping the ratio of CISPO (arXiv:2506.13585 eq. 4) leaves a token its gradient, whatever the advantage.
    is_cispo = parameters.surrogate == "cispo"
    is_low, is_high = (is_cispo | (advantages < 0)) & (ratio < low), (is_cispo | (advantages > 0)) & (ratio > high)
    clipped = {"actor_clip_ratio": is_low | is_high, "clip_ratio_low": is_low, "clip_ratio_high": is_high}
    if is_cispo:
        return -jax.lax.stop_gradient(jnp.clip(ratio, low, high)) * advantages * logprobs, clipped
    losses = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, low, high))
    # Where the advantage is negative the loss would grow with the ratio without end (arXiv:1912.09729).
    if parameters.dual_clip is not None:
        is_dual = (advantages < 0) & (ratio > parameters.dual_clip)
        losses = jnp.where(is_dual, -advantages * parameters.dual_clip, losses)
        clipped["dual_clip_ratio"] = is_dual
    return losses, clipped
