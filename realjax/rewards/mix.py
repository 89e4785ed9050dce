"""Where the reward of a sequence comes from: a reward model's score, anything that reads texts, or a weighted sum."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from realjax.core.host_call import Arrays, HostFn, HostResult, State
from realjax.core.metrics import Total, measure_mean
from realjax.core.segments import last_token_mask, segment_mask
from realjax.rewards.failures import Failures

REWARD_OUTPUTS = ("rewards", "is_failed")
FAILED = "reward/failed"
TERMS = "reward_terms"  # each source's own, where there are several
# `has_eos` is read for its width: the number of columns that arrays of one value a sequence have.
MODEL_REWARD_INPUTS = ("scores", "has_eos")


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """One part of a reward: a host call that writes `rewards` `[R, S]` from `inputs`, and its share of the sum."""

    name: str
    fn: HostFn
    inputs: tuple[str, ...]
    weight: float = 1.0
    title: str | None = None  # what an error calls it; None is its name
    can_fail: bool = False  # nan is an answer that it could not score, and no mistake


def make_model_reward(*, scaling: float = 1.0, bias: float = 0.0) -> HostFn:
    """Returns the host call `scores` `[R, T]` -> `rewards` `[R, S]`: (score at the last token - bias) * scaling."""

    def reward(arrays: Arrays, state: State) -> HostResult:
        scores = score_at_end(arrays["scores"], arrays["segment_ids"], num_columns=arrays["has_eos"].shape[1])
        exists = segment_mask(arrays["segment_ids"], arrays["has_eos"].shape[1])
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told where rewards are mixed
            rewards = np.where(exists, (scores - bias) * scaling, 0).astype(np.float32)
        return HostResult(arrays={"rewards": rewards})

    return reward


def mix_rewards(
    sources: Sequence[RewardSource], *, max_failed_share: float = 1.0, failures: Failures | None = None
) -> HostFn:
    """Returns the host call whose `rewards` are the sources' weighted sum; metrics hold each one's mean, unweighted.

    With several sources it also writes `reward_terms` `[R, S, sources]`, unweighted, see `mixed_outputs`.
    `is_failed` `[R, S]` marks answers that a source could not score, or that have failed before (`env_failed`); their
    reward is nan. A source keeps its own state. Raises ValueError without a source, and where two have one name. The
    call does, naming the source, for a reward that is not finite in float32; and, with what `failures` tell, where more
    than a share of the answers has failed.
    """
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"reward: found the sources {names}; needed at least one, each with a name of its own")

    def reward(arrays: Arrays, state: State) -> HostResult:
        total, new_state, metrics = np.float64(0), {}, {}
        terms: list[np.ndarray] = []
        for source in sources:
            prefix = f"{source.name}/"
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            result = source.fn(arrays, own)
            rewards = result.arrays["rewards"].astype(np.float64)
            exists = segment_mask(arrays["segment_ids"], rewards.shape[1])
            has_failed = exists & arrays.get("env_failed", np.zeros(exists.shape)).astype(bool)
            total = total + _weighted(source, np.where(has_failed, np.nan, rewards), has_failed)
            terms.append(rewards)
            new_state |= {prefix + key: value for key, value in result.state.items()}
            is_scored = exists & ~has_failed & ~np.isnan(rewards)
            metrics |= {f"reward/{source.name}": measure_mean(rewards, is_scored), **result.metrics}
        is_failed = exists & np.isnan(total)
        num_failed, num_answers = int(is_failed.sum()), int(exists.sum())
        if num_failed > max_failed_share * num_answers:
            raise ValueError(_describe_share(num_failed, num_answers, max_failed_share, failures))
        metrics[FAILED] = Total(float(num_failed))
        arrays_out = {"rewards": np.asarray(total, np.float32), "is_failed": is_failed}
        if len(sources) > 1:
            arrays_out[TERMS] = np.stack(terms, axis=-1).astype(np.float32)
        return HostResult(arrays=arrays_out, state=new_state, metrics=metrics)

    return reward


def _describe_share(num_failed: int, num_answers: int, most: float, failures: Failures | None) -> str:
    reason = str(failures or "")
    return (
        f"reward: {num_failed} of {num_answers} answers could not be scored, and reward.max_failed_share is {most:g}"
        f"{f' ({reason})' if reason else ''}; mend the cause, or raise the share"
    )


def _weighted(source: RewardSource, rewards: np.ndarray, has_failed: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = source.weight * rewards
    is_spared = has_failed | (np.isnan(rewards) if source.can_fail else False)
    if (is_bad := ~(np.abs(weighted) <= np.finfo(np.float32).max) & ~is_spared).any():
        raise ValueError(
            f"reward: {source.title or source.name} gave {rewards[is_bad][0]} (weight {source.weight}) for "
            f"{np.count_nonzero(is_bad)} answers; a reward must be finite in float32"
        )
    return weighted


def mixed_inputs(sources: Sequence[RewardSource]) -> tuple[str, ...]:
    """Returns the keys that a mix of the sources reads."""
    return tuple(dict.fromkeys(key for source in sources for key in source.inputs))


def mixed_outputs(sources: Sequence[RewardSource]) -> tuple[str, ...]:
    """Returns the keys that a mix of the sources writes."""
    return (*REWARD_OUTPUTS, TERMS) if len(sources) > 1 else REWARD_OUTPUTS


def score_at_end(scores: np.ndarray, segment_ids: np.ndarray, *, num_columns: int) -> np.ndarray:
    """Returns the float64 score `[R, num_columns]` at the last token of each segment, 0 where there is none."""
    rows, tokens = np.nonzero(last_token_mask(segment_ids))
    at_end = np.zeros((len(segment_ids), num_columns))
    at_end[rows, segment_ids[rows, tokens] - 1] = scores[rows, tokens]
    return at_end
