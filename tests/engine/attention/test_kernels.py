from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from realjax.engine.attention.choose import KERNELS, make_attention, make_decoding
from tests.given.models import CASE, PORTABLE_KERNELS, make_layout, quick_jit

N, K, H = 4, 2, 4


def make_inputs(row_len: int, num_kv_heads: int = K, seed: int = 0):
    """Returns random q, k, v and segment ids of three rows: packed with padding, one long sequence, all padding."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: rng.standard_normal((3, row_len, heads, H)).astype(np.float32)
    segment_ids = np.zeros((3, row_len), np.int32)
    cuts = np.sort(rng.choice(np.arange(1, row_len), 5, replace=False))
    segment_ids[0, : cuts[-1]] = np.searchsorted(cuts[:-1], np.arange(cuts[-1]), side="right") + 1
    segment_ids[1] = 1
    return draw(N), draw(num_kv_heads), draw(num_kv_heads), segment_ids


def one_token_at_a_time(q, k, v, segment_ids, window):
    """The definition, in float64: each query against the keys it may see, and no others."""
    out = np.zeros_like(q, np.float64)
    group = q.shape[2] // k.shape[2]
    for r, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s for s in range(t + 1) if segment_ids[r, s] == segment_ids[r, t] and (window is None or t - s < window)
        ]
        scores = k[r, seen, n // group].astype(np.float64) @ q[r, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[r, t, n] = weights @ v[r, seen, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize("row_len", [17, 96, 256])
@pytest.mark.parametrize("kernel", PORTABLE_KERNELS)
def test_every_kernel_attends_to_its_own_segment_and_window(kernel, row_len, window):
    q, k, v, segment_ids = make_inputs(row_len)
    found = quick_jit(partial(make_attention(kernel, CASE), window=window))(q, k, v, segment_ids)
    expected = one_token_at_a_time(q, k, v, segment_ids, window)
    real = segment_ids > 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kernel", PORTABLE_KERNELS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_shards", [2, 4])
def test_repeating_kv_heads_for_shards_changes_nothing(kernel, num_kv_heads, num_shards):
    q, k, v, segment_ids = make_inputs(24, num_kv_heads)
    alone = quick_jit(partial(make_attention(kernel, CASE), window=None))(q, k, v, segment_ids)
    attention_fn = make_attention(kernel, CASE, make_layout(tp=num_shards))
    repeated = quick_jit(partial(attention_fn, window=None))(q, k, v, segment_ids)
    np.testing.assert_allclose(repeated, alone, atol=1e-6)


@pytest.mark.parametrize("kernel", PORTABLE_KERNELS)
@pytest.mark.parametrize("window", [None, 7, 90])
def test_a_bound_on_segments_changes_nothing_where_it_holds(kernel, window):
    q, k, v, segment_ids = make_inputs(192)
    segment_ids[:] = np.arange(192) // 50 + 1
    free = quick_jit(partial(make_attention(kernel, CASE), window=window))(q, k, v, segment_ids)
    for bound in (50, 51, 190, 5000):
        attention_fn = make_attention(kernel, CASE, max_segment_len=bound)
        bounded = quick_jit(partial(attention_fn, window=window))(q, k, v, segment_ids)
        np.testing.assert_allclose(bounded, free, atol=1e-6)


@pytest.mark.parametrize("kernel", [name for name in PORTABLE_KERNELS if name != "dense"])
@pytest.mark.parametrize("num_kv_heads", [1, N])
@pytest.mark.parametrize(("row_len", "window"), [(96, None), (96, 20), (320, 65), (320, 64), (640, 120)])
def test_every_kernel_has_the_gradients_of_the_reference(kernel, row_len, window, num_kv_heads):
    q, k, v, segment_ids = make_inputs(row_len, num_kv_heads)
    weights = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32) * (segment_ids > 0)[..., None, None]

    def loss(kernel, q, k, v):
        return (make_attention(kernel, CASE)(q, k, v, segment_ids, window) * weights).sum()

    found = quick_jit(jax.grad(partial(loss, kernel), (0, 1, 2)))(q, k, v)
    expected = quick_jit(jax.grad(partial(loss, "dense"), (0, 1, 2)))(q, k, v)
    for one, other in zip(found, expected):
        assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(other)


DECODING_KERNELS = tuple(name for name in PORTABLE_KERNELS if KERNELS[name].decoding)
DECODING = replace(CASE, use="decoding")


@pytest.mark.parametrize("num_kv_heads", [1, K, N])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("kernel", DECODING_KERNELS)
def test_a_token_decoded_is_the_last_of_its_row(kernel, window, num_kv_heads):
    """The cache is longer than the row, and what is behind the row in it does not matter."""
    q, k, v, _ = make_inputs(24, num_kv_heads)
    lengths, rows = np.array([0, 7, 17]), np.arange(3)
    expected = one_token_at_a_time(q, k, v, np.ones((3, 24)), window)[rows, lengths]
    cache = (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
    found = quick_jit(partial(make_decoding(kernel, DECODING), window=window))(q[rows, lengths], *cache, lengths)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    beyond = np.arange(24) > lengths[:, None]
    cache = (np.where(beyond[:, None, None], 1e3, cache[0]), np.where(beyond[:, None, :, None], 1e3, cache[1]))
    again = quick_jit(partial(make_decoding(kernel, DECODING), window=window))(q[rows, lengths], *cache, lengths)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("kernel", DECODING_KERNELS)
def test_query_heads_split_over_devices_decode_alike(kernel):
    """Four query heads on four devices, which share two key-value heads: each device has both of them."""
    q, k, v, _ = make_inputs(24)
    layout, lengths = make_layout(tp=4), np.array([3, 23, 11])
    args = (q[:, 0], k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
    alone = quick_jit(partial(make_decoding(kernel, DECODING), window=None))(*args, lengths)
    heads = layout.sharding(None, "tensor")
    spread = jax.device_put(args, (heads, layout.replicated, layout.replicated))
    decode = quick_jit(partial(make_decoding(kernel, DECODING), window=None), out_shardings=heads)
    np.testing.assert_allclose(decode(*spread, lengths), alone, atol=1e-6)
