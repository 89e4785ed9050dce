"""PPO (arXiv:1707.06347) with a critic: advantages by GAE, clipped losses of actor and critic."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.responses import Responses
from realjax.algorithms.returns import (
    clipped_scores,
    earned_in_turns,
    generalized_advantages,
    kl_penalty,
    place_scores,
    rollout_metrics,
    sequence_shares,
    whiten,
)
from realjax.algorithms.value_norm import Statistics, read_statistics, update_statistics
from realjax.core.batch import Batch
from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Last, Mean, Total, measure_mean, measure_std
from realjax.core.option import option
from realjax.core.segments import move_to_next

CRITIC_INPUTS = ("tokens", "train_mask", "returns", "old_values")


@dataclass(frozen=True, kw_only=True)
class PPOParameters(PolicyParameters):
    """PPO's parameters, with ReaL's names. Raises ValueError for values outside their range.

    Without `missing_eos_penalty` a response that was cut off has no score, and its return goes on with the critic's
    value; with one it ends like any other, its score less the penalty. What an environment gave for a turn counts at
    the turn's end, in responses that were cut off too.
    """

    gae_lambda: float = option(1.0, "lambda of generalised advantage estimation", at_least=0, at_most=1)
    value_eps_clip: float = option(0.2, "new values count up to value_eps_clip away from the old ones", above=0)
    value_norm: bool = option(True, "normalise the critic's targets by running statistics of the returns")
    value_norm_type: Literal["exp", "ma"] = option("exp", "exp: exponential means. ma: means over all returns")
    value_norm_beta: float = option(0.99995, "decay of the exponential means, per step", at_least=0, below=1)
    value_norm_eps: float = option(1e-5, "least weight the exponential means are divided by", above=0)

    JUDGED_BY: ClassVar[tuple[str, ...]] = ("values",)
    ADVANTAGE_OUTPUTS: ClassVar[tuple[str, ...]] = ("advantages", "returns", "old_values", "train_mask", "seq_share")


def make_advantages(parameters: PPOParameters) -> HostFn:
    """Returns the host call that makes `advantages`, `returns`, `old_values` and `train_mask`, all `[R, T]`, and
    `seq_share` `[R, S]`.
    """
    return partial(compute_advantages, parameters=parameters)


def compute_advantages(arrays: Arrays, state: State, *, parameters: PPOParameters) -> HostResult:
    """Returns advantages and value targets of a whole batch of rollouts.

    Values are denormalised with the statistics that the critic was trained by so far; these then take in the new
    returns, and targets are normalised with the result. The state holds the statistics and the KL controller.
    """
    responses, has_eos = Responses.of(arrays), arrays["has_eos"].astype(bool)
    penalty = kl_penalty(arrays, state, responses, parameters)
    goes_on = ~has_eos if parameters.missing_eos_penalty is None else np.zeros_like(has_eos)
    scores = np.where(goes_on, earned_in_turns(arrays, responses), clipped_scores(arrays, parameters))
    read = partial(read_statistics, kind=parameters.value_norm_type, eps=parameters.value_norm_eps)
    old_statistics = read(state) if parameters.value_norm else Statistics()
    values = old_statistics.denormalise(arrays["values"].astype(np.float64))
    advantages, returns = generalized_advantages(
        responses,
        penalty.rewards + place_scores(arrays, responses, scores),
        values,
        goes_on,
        discount=parameters.discount,
        gae_lambda=parameters.gae_lambda,
    )
    targets, statistics_state = returns, {}
    if parameters.value_norm:
        kind, beta = parameters.value_norm_type, parameters.value_norm_beta
        statistics_state = update_statistics(state, returns[responses.mask], kind=kind, beta=beta)
        targets = responses.select(read(statistics_state).normalise(returns))
    values_before = responses.select(move_to_next(values, responses.segment_ids))
    metrics = rollout_metrics(arrays, responses, parameters) | penalty.metrics
    metrics |= {
        "advantage": measure_mean(advantages, responses.mask),
        "advantage_std": measure_std(advantages, responses.mask),
        "returns": measure_mean(returns, responses.mask),
        "returns_std": measure_std(returns, responses.mask),
        "values": measure_mean(values_before, responses.mask),
        "explained_variance": Last(_explained_variance(values_before[responses.mask], returns[responses.mask])),
    }
    outputs = {
        "advantages": whiten(advantages, responses.mask) if parameters.adv_norm else advantages,
        "returns": targets,
        "old_values": responses.select(move_to_next(arrays["values"], responses.segment_ids)),
    }
    outputs["seq_share"] = sequence_shares(responses, responses)
    arrays_out = {name: array.astype(np.float32) for name, array in outputs.items()}
    return HostResult(
        arrays=arrays_out | {"train_mask": responses.mask},
        state={**penalty.state, **statistics_state},
        metrics=metrics,
    )


def _explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """Returns 1 - Var(returns - values) / Var(returns); 0 where returns do not vary."""
    variance = float(returns.var()) if returns.size else 0.0
    return 1 - float((returns - values).var()) / variance if variance > 0 else 0.0


def make_critic_loss(parameters: PPOParameters) -> Loss:
    """Returns the critic's loss."""
    return Loss(head="values", fn=partial(critic_loss, parameters=parameters))


def critic_loss(outputs: Mapping[str, Array], batch: Batch, *, parameters: PPOParameters) -> LossSums:
    """Returns half the squared error of the value before each token, summed over tokens, the worse of clipped and not.

    Reads `train_mask`, `returns` and `old_values`, `[R, T]`, in the critic's own units, which are normalised ones with
    `value_norm`. `values` and `value_targets` report means in these units.
    """
    mask = batch["train_mask"]
    select = lambda x: jnp.where(mask, x, 0)
    num_tokens = jnp.sum(mask.astype(jnp.float32))
    mean = lambda x: Mean(jnp.sum(select(x).astype(jnp.float32)), num_tokens)
    new = select(move_to_next(outputs["values"], batch["segment_ids"]))
    old, targets = select(batch["old_values"]), select(batch["returns"])
    clipped = old + jnp.clip(new - old, -parameters.value_eps_clip, parameters.value_eps_clip)
    plain_loss, clipped_loss = jnp.square(new - targets) / 2, jnp.square(clipped - targets) / 2
    loss = mean(jnp.maximum(plain_loss, clipped_loss))
    # By the distance too: of values that have not moved, one loss is larger by rounding.
    is_clipped = (jnp.abs(new - old) > parameters.value_eps_clip) & (clipped_loss > plain_loss)
    return LossSums(
        loss=loss,
        metrics={
            "value_loss": loss,
            "value_clip_ratio": mean(is_clipped),
            "values": mean(new),
            "value_targets": mean(targets),
            "n_tokens": Total(num_tokens),
        },
    )
