"""From scores of whole responses to advantages of their tokens, on packed rows in host memory, in float64."""

from dataclasses import dataclass

import numpy as np

from realjax.algorithms.kl import KL_COEFFICIENT, MAX_EXPONENT, adapt_coefficient, estimate_kl, kl_coefficient
from realjax.algorithms.policy import PolicyParameters
from realjax.algorithms.responses import Responses, sum_at
from realjax.core.host_call import Arrays, State
from realjax.core.metrics import Last, Least, Metric, Most, Total, measure_mean, measure_std
from realjax.core.segments import move_to_next


@dataclass(frozen=True, kw_only=True, eq=False)
class Penalty:
    """The KL to the reference as part of the reward, the controller's next state, and what to report."""

    rewards: np.ndarray  # [R, T], 0 off the responses
    state: dict[str, float]
    metrics: dict[str, Metric]


def kl_penalty(arrays: Arrays, state: State, responses: Responses, parameters: PolicyParameters) -> Penalty:
    """Returns -coefficient * KL estimate at each response token, 0 where the KL is in the loss.

    Reported are means of old - reference log-probabilities: over response tokens, and over responses of their sums,
    which is what the controller steers by.
    """
    coefficient = kl_coefficient(state, parameters.kl_ctl) if parameters.use_adaptive_kl_ctl else parameters.kl_ctl
    rewards = np.zeros(responses.mask.shape)
    if not parameters.needs_reference:
        return Penalty(rewards=rewards, state={}, metrics={})
    old = responses.select(arrays[parameters.old_logprobs])
    reference = responses.select(arrays["ref_logprobs"])
    of_responses = measure_mean(responses.sum(old - reference), responses.exists)
    if parameters.kl_in == "reward":
        rewards = -coefficient * estimate_kl(old, reference, parameters.kl_estimator)
    metrics: dict[str, Metric] = {
        "kl": measure_mean(old - reference, responses.mask),
        "kl_per_response": of_responses,
        "kl_reward": measure_mean(rewards, responses.mask),
        "kl_coef": Last(coefficient),
    }
    if not parameters.use_adaptive_kl_ctl:
        return Penalty(rewards=rewards, state={}, metrics=metrics)
    if not responses.num_seqs:  # all failed
        return Penalty(rewards=rewards, state={KL_COEFFICIENT: coefficient}, metrics=metrics)
    target, horizon = parameters.adaptive_kl_target, parameters.adaptive_kl_horizon
    adapted = adapt_coefficient(coefficient, of_responses.value, responses.num_seqs, target=target, horizon=horizon)
    return Penalty(rewards=rewards, state={KL_COEFFICIENT: adapted}, metrics=metrics)


def clipped_scores(arrays: Arrays, parameters: PolicyParameters) -> np.ndarray:
    """Returns the scores `[R, S]` within +-max_reward_clip, then less the penalty of responses that were cut off."""
    limit, penalty = parameters.max_reward_clip, parameters.missing_eos_penalty or 0.0
    scores = np.clip(arrays["rewards"].astype(np.float64), -limit, limit)
    return np.where(arrays["has_eos"], scores, scores - penalty)


def earned_in_turns(arrays: Arrays, responses: Responses) -> np.ndarray:
    """Returns what an environment gave for the turns of each response, `[R, S]`; 0 without one."""
    given = arrays.get("turn_rewards")
    return np.zeros(responses.exists.shape) if given is None else responses.sum(given.astype(np.float64))


def place_scores(arrays: Arrays, responses: Responses, scores: np.ndarray) -> np.ndarray:
    """Returns `[R, T]` with the scores `[R, S]` as sums: what an environment gave for a turn stands at the turn's last
    token, all else at the response's.
    """
    given = arrays.get("turn_rewards")
    if given is None:
        return responses.place_last(scores)
    return responses.select(given) + responses.place_last(scores - earned_in_turns(arrays, responses))


def generalized_advantages(
    responses: Responses,
    rewards: np.ndarray,
    values: np.ndarray,
    goes_on: np.ndarray,
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns advantages and returns `[R, T]` of the actions that emitted response tokens (arXiv:1506.02438 eq. 16).

    `values` `[R, T]`: the critic after reading each token. `goes_on` `[R, S]`: sequences whose return goes on with
    the value after their last token; all others end with 0. Tokens between two parts of a response are stepped over.
    """
    before = responses.select(move_to_next(values, responses.segment_ids))
    rewards = responses.select(rewards)
    after_last = np.where(responses.place_last(goes_on) > 0, values, 0).astype(np.float64)
    is_last = responses.place_last(np.ones(goes_on.shape)) > 0
    advantages = np.zeros(rewards.shape)
    next_value = next_advantage = np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        next_value = np.where(is_last[:, t], after_last[:, t], next_value)
        next_advantage = np.where(is_last[:, t], 0, next_advantage)
        delta = rewards[:, t] + discount * next_value - before[:, t]
        is_action = responses.mask[:, t]
        advantages[:, t] = np.where(is_action, delta + discount * gae_lambda * next_advantage, 0)
        next_advantage = np.where(is_action, advantages[:, t], next_advantage)
        next_value = np.where(is_action, before[:, t], next_value)
    return advantages, responses.select(advantages + before)


def discounted_to_tokens(responses: Responses, advantages_RS: np.ndarray, discount: float) -> np.ndarray:
    """Returns `[R, T]`: a sequence's advantage at its last response token, discounted once for each token before."""
    return responses.select(responses.spread(advantages_RS) * discount ** responses.tokens_left())


def whiten(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns (values - mean) / (std + 1e-5) with the biased moments of the masked entries; 0 off the mask."""
    if not mask.any():
        return np.zeros(values.shape)
    mean, std = values[mask].mean(), values[mask].std()
    return np.where(mask, (values - mean) / (std + 1e-5), 0)


def sequence_shares(responses: Responses, trained: Responses) -> np.ndarray:
    """Returns `[R, S]`: of how many of all `responses` each that is learned from stands for, 0 for the others.

    A mean over sequences that adds these up is over all responses; those that were left out add nothing to it. Updates
    share them alike, in proportion to what each learns from.
    """
    is_learned = trained.lens > 0
    return is_learned * (responses.num_seqs / max(1, np.count_nonzero(is_learned)))


def rollout_metrics(arrays: Arrays, responses: Responses, parameters: PolicyParameters) -> dict[str, Metric]:
    """Returns what is to be known of the sequences: their scores before clipping, and `answer_metrics`.

    `sampler_error`, with recomputed log-probabilities, is the mean of exp(|recomputed - sampler's|): 1 where sampler
    and trainer agree.
    """
    exists, rewards = responses.exists, arrays["rewards"].astype(np.float64)
    metrics: dict[str, Metric] = {
        "task_reward": measure_mean(rewards, exists),
        "task_reward_std": measure_std(rewards, exists),
        **answer_metrics(arrays, responses),
    }
    if parameters.recomputes:
        gap = np.abs(responses.select(arrays["old_logprobs"]) - responses.select(arrays["logprobs"]))
        metrics["sampler_error"] = measure_mean(np.exp(np.minimum(gap, MAX_EXPONENT)), responses.mask)
    return metrics


def answer_metrics(arrays: Arrays, responses: Responses) -> dict[str, Metric]:
    """Returns how long the sequences are and how they end.

    `entropy_estimate` is the mean of -log-probability of the tokens drawn.
    """
    exists = responses.exists
    is_token = responses.segment_ids > 0
    seq_lens = sum_at(is_token, is_token, responses.segment_ids, exists.shape)
    lens = responses.lens[exists]
    sampled = responses.select(arrays["logprobs"])
    return {
        "avg_seq_len": measure_mean(seq_lens, exists),
        "avg_prompt_len": measure_mean(seq_lens - responses.lens, exists),
        "avg_response_len": measure_mean(responses.lens, exists),
        "std_response_len": measure_std(responses.lens, exists),
        "min_response_len": Least(float(lens.min(initial=lens.max(initial=0)))),
        "max_response_len": Most(float(lens.max(initial=0))),
        "eos_share": measure_mean(arrays["has_eos"], exists),
        "entropy_estimate": measure_mean(-sampled, responses.mask),
        "n_tokens": Total(float(responses.num_tokens)),
        "n_seqs": Total(float(responses.num_seqs)),
    }
