"""A kernel compared with the definition, on the device where it is to run, before it is trusted there."""

import logging
import time
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.engine.attention.cases import Case
from realjax.engine.attention.reference import dense_attention
from realjax.models.attention import Scoring

logger = logging.getLogger("realjax.engine")

# rows_fn(q_RTNH, k_RTKH, v_RTKH, segment_ids_RT, scoring, sinks_N, max_segment_len) -> RTNH
RowsFn = Callable[[Array, Array, Array, Array, Scoring, Array | None, int | None], Array]

ROW_LEN = 256
# Two rows: two long segments, many short ones and padding; and one segment.
LENGTHS = ((100, 1, 64, *[3] * 20), (ROW_LEN,))
# Rounding in bfloat16 is 0.004 of a number; what a token sees too much or too little is a good part of it.
MOST_DIFFERENCE = 0.03


@lru_cache
def find_disagreement(rows_fn: RowsFn, case: Case) -> str | None:
    """Returns how a kernel differs from the definition on small packed rows, None where it agrees.

    Values and gradients, with the case's heads, scores and type, without and with its window. None also where no
    device of the case's platform is at hand, as when programs are compiled for devices elsewhere. A second or so.
    """
    devices = [device for device in jax.local_devices() if device.platform == case.platform]
    if not devices:
        logger.info("attention: not compared with the definition: no device of platform %s is at hand", case.platform)
        return None
    start = time.perf_counter()
    for window in {None, case.window and min(case.window, 33)}:
        with jax.default_device(devices[0]):
            try:
                fault = _compare(rows_fn, case, window)
            except Exception as error:  # whatever a library that is not ours may raise
                fault = f"it failed on {devices[0]}: {error}"
        if fault:
            return fault
    logger.info("attention: agrees with the definition on %s (%.1f s)", devices[0], time.perf_counter() - start)
    return None


def _compare(rows_fn: RowsFn, case: Case, window: int | None) -> str | None:
    rng = np.random.default_rng(0)
    segment_ids = np.zeros((len(LENGTHS), ROW_LEN), np.int32)
    for row, lengths in enumerate(LENGTHS):
        ids = np.repeat(np.arange(len(lengths)), lengths) + 1
        segment_ids[row, : len(ids)] = ids
    is_token = (segment_ids > 0)[..., None, None]
    group = case.num_q_heads // case.num_kv_heads
    heads = {"q": 2 * group, "k": 2, "v": 2, "weights": 2 * group}
    draw = lambda num: rng.standard_normal((*segment_ids.shape, num, case.head_dim))
    # Numbers of the kernel's type, so that both compute from the same.
    q, k, v, weights = (jnp.asarray(draw(num) * is_token, case.dtype) for num in heads.values())
    sinks = jnp.asarray(rng.standard_normal(2 * group), jnp.float32) if case.sinks else None
    scoring = Scoring(window=window, softcap=case.softcap, scale=case.scale)

    @partial(jax.jit, static_argnums=(0, 1))
    def outcome(fn: RowsFn, dtype: str, segment_ids: Array, weights: Array, *inputs: Array) -> tuple[Array, ...]:
        def attend(q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
            return jnp.where(is_token, fn(q, k, v, segment_ids, scoring, sinks, ROW_LEN), 0)

        attended, backward = jax.vjp(attend, *(x.astype(dtype) for x in inputs), sinks)
        return attended, *(x for x in backward(weights.astype(dtype)) if x is not None)

    found = outcome(rows_fn, case.dtype, segment_ids, weights, q, k, v)
    with jax.default_matmul_precision("highest"):
        expected = outcome(dense_attention, "float32", segment_ids, weights, q, k, v)
    names = ("its values", "the gradients of q", "of k", "of v", *["of sinks"] * case.sinks)
    for name, one, other in zip(names, found, expected, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        difference = np.linalg.norm(one - other) / np.linalg.norm(other)
        if not difference <= MOST_DIFFERENCE:  # NaN too
            at = "" if window is None else f" with a window of {window}"
            return f"{name} differ from the definition by {difference:.2g} of their size on packed rows{at}"
    return None
