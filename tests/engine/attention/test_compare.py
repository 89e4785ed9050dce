"""A kernel is compared with the definition before it is trusted."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from realjax.engine.attention.choose import KERNELS
from realjax.engine.attention.compare import find_disagreement
from realjax.engine.attention.cudnn import cudnn_attention
from realjax.engine.attention.reference import dense_attention
from tests.given.cudnn import emulate_cudnn
from tests.given.models import CASE, PORTABLE_KERNELS

SMALL = replace(CASE, head_dim=8, num_q_heads=4, num_kv_heads=2, window=20)
SINKS = replace(SMALL, sinks=True)
CAPPED = replace(SINKS, softcap=2.0, scale=0.9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", PORTABLE_KERNELS)
def test_right_kernels_agree(kernel, dtype):
    assert find_disagreement(KERNELS[kernel].rows, replace(SMALL, dtype=dtype)) is None


@pytest.mark.parametrize(("kernel", "case"), [("dense", CAPPED), ("blocked", CAPPED), ("xla", SINKS)])
def test_right_kernels_agree_on_scores_in_16_bits(kernel, case):
    assert find_disagreement(KERNELS[kernel].rows, replace(case, dtype="bfloat16")) is None


def test_cudnn_as_it_is_documented_agrees():
    emulate_cudnn()
    assert find_disagreement(cudnn_attention, SINKS) is None


def across_segments(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    return dense_attention(q, k, v, jnp.minimum(segment_ids, 1), scoring, sinks)


def of_first_rows(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    """Right in all rows but the last."""
    right = dense_attention(q, k, v, segment_ids, scoring, sinks)
    return right.at[-1].set(0)


def without_window(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    return dense_attention(q, k, v, segment_ids, replace(scoring, window=None), sinks)


def without_gradients(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    k = k.at[:, 50:60].set(jax.lax.stop_gradient(k[:, 50:60]))
    return dense_attention(q, k, v, segment_ids, scoring, sinks)


def without_sinks(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    return dense_attention(q, k, v, segment_ids, scoring)


def without_gradient_of_sinks(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    return dense_attention(q, k, v, segment_ids, scoring, jax.lax.stop_gradient(sinks))


def without_cap(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    return dense_attention(q, k, v, segment_ids, replace(scoring, softcap=None), sinks)


def without_scale(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    return dense_attention(q, k, v, segment_ids, replace(scoring, scale=None), sinks)


def with_nan(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    return dense_attention(q, k, v, segment_ids, scoring, sinks) + jnp.nan


def that_fails(q, k, v, segment_ids, scoring, sinks, max_segment_len):
    raise RuntimeError("cuDNN is not detected")


@pytest.mark.parametrize(
    ("rows_fn", "words"),
    [
        (across_segments, "its values differ"),
        (of_first_rows, "its values differ"),
        (without_window, "with a window of 20"),
        (without_gradients, "of k differ"),
        (with_nan, "by nan of their size"),
        (that_fails, "it failed on .*: cuDNN is not detected"),
        (without_sinks, "its values differ"),
        (without_gradient_of_sinks, "of sinks differ"),
        (without_cap, "its values differ"),
        (without_scale, "its values differ"),
    ],
)
def test_what_is_wrong_is_said(rows_fn, words):
    fault = find_disagreement(rows_fn, CAPPED)
    assert fault and re.search(words, fault)


def test_without_a_device_of_the_platform_nothing_is_run():
    assert find_disagreement(that_fails, replace(SMALL, platform="gpu")) is None
