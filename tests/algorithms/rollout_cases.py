"""Random rollouts, ways to pack them, and garbage wherever nothing may look."""

from dataclasses import dataclass

import numpy as np

from realjax.core.batch import Batch
from realjax.data.packing import PackPlan
from tests.given.sequences import pack_in_order, unpack_array

Rollout = dict[str, np.ndarray]
# Prompt and response lengths: single tokens, empty responses, and prompts of one token among them.
LENGTHS = ((3, 5), (1, 1), (4, 0), (2, 9), (6, 3), (1, 7), (5, 1), (2, 2), (1, 12), (3, 4))
GROUPS = (0, 0, 1, 0, 1, 1, 2, 3, 3, 3)
CUT_OFF = (3, 5, 6)  # sequences that do not end with an end-of-text token, beside the empty one


def make_rollouts(seed: int = 0, *, ends: bool = True) -> list[Rollout]:
    """Returns rollouts with everything a host call may read; without `ends` no response has an end-of-text token."""
    rng = np.random.default_rng(seed)
    return [_rollout(rng, i, ends) for i in range(len(LENGTHS))]


def _rollout(rng: np.random.Generator, i: int, ends: bool) -> Rollout:
    prompt_len, response_len = LENGTHS[i]
    n = prompt_len + response_len
    is_response = np.arange(n) >= prompt_len
    normal = lambda scale: (rng.standard_normal(n) * scale).astype(np.float32)
    logprobs = -np.abs(normal(1.5)) * is_response
    return {
        "tokens": rng.integers(1, 90, n, dtype=np.int32),
        "loss_mask": is_response,
        "logprobs": logprobs,
        "old_logprobs": logprobs + normal(0.1) * is_response,
        "ref_logprobs": logprobs + normal(0.4),
        "values": normal(1.0),
        "rewards": np.float32(rng.normal(0, 3)),
        "has_eos": np.array(ends and response_len > 0 and i not in CUT_OFF),
        "group": np.int32(GROUPS[i]),
        "is_baseline": np.array(i == GROUPS.index(GROUPS[i])),
    }


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How rollouts lie in rows; none of it may change a result."""

    row_len: int = 13
    order: tuple[int, ...] = tuple(range(len(LENGTHS)))
    num_rows: int = 12

    def pack(self, rollouts: list[Rollout]) -> tuple[Batch, PackPlan]:
        """Returns the batch, its last rows empty, and where everything went."""
        return pack_in_order(rollouts, self.row_len, order=self.order, num_rows=self.num_rows)


PACKINGS = {
    "short rows": Packing(),
    "two rows": Packing(row_len=40, order=(4, 9, 0, 8, 2, 1, 7, 3, 6, 5), num_rows=2),
    "one row and empty ones": Packing(row_len=90, order=(9, 8, 7, 6, 5, 4, 3, 2, 1, 0), num_rows=3),
}


def host_arrays(batch: Batch) -> dict[str, np.ndarray]:
    return {key: np.asarray(batch[key]) for key in batch}


def poisoned(arrays: dict[str, np.ndarray], garbage: float = np.nan) -> dict[str, np.ndarray]:
    """Returns the arrays with garbage at prompts and padding, where values still count before and after responses."""
    mask, segment_ids = arrays["loss_mask"], arrays["segment_ids"]
    is_read_later = np.pad(mask, ((0, 0), (0, 1)))[:, 1:]
    spoiled = {key: np.where(mask, arrays[key], garbage) for key in arrays if key.endswith("logprobs")}
    spoiled["values"] = np.where(mask | is_read_later, arrays["values"], garbage)
    columns = np.arange(arrays["rewards"].shape[1])
    spoiled["rewards"] = np.where(columns < segment_ids.max(axis=1)[:, None], arrays["rewards"], garbage)
    return arrays | {key: array.astype(np.float32) for key, array in spoiled.items()}


def run_host_call(fn, rollouts: list[Rollout], state=None, *, packing: str = "short rows", garbage: float = np.nan):
    """Returns each output by sequence, the new state and the metrics; garbage stands wherever nothing may look."""
    batch, plan = PACKINGS[packing].pack(rollouts)
    result = fn(poisoned(host_arrays(batch), garbage), state or {})
    outputs = {key: unpack_array(array, plan) for key, array in result.arrays.items()}
    assert all(np.isfinite(array).all() for array in result.arrays.values())
    return outputs, result
