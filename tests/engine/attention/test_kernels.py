from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from realjax.engine.attention.choose import KERNELS, make_attention, make_decoding
from realjax.models.attention import Scoring
from tests.given.models import CASE, PORTABLE_KERNELS, make_layout, quick_jit

N, K, H = 4, 2, 4
PLAIN = Scoring()


def attend(kernel, scoring=PLAIN, sinks=None, **options):
    """Returns the compiled kernel for rows."""
    return quick_jit(partial(make_attention(kernel, CASE, **options), scoring=scoring, sinks=sinks))


def make_inputs(row_len: int, num_kv_heads: int = K, seed: int = 0):
    """Returns random q, k, v and segment ids of three rows: packed with padding, one long sequence, all padding."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: rng.standard_normal((3, row_len, heads, H)).astype(np.float32)
    segment_ids = np.zeros((3, row_len), np.int32)
    cuts = np.sort(rng.choice(np.arange(1, row_len), 5, replace=False))
    segment_ids[0, : cuts[-1]] = np.searchsorted(cuts[:-1], np.arange(cuts[-1]), side="right") + 1
    segment_ids[1] = 1
    return draw(N), draw(num_kv_heads), draw(num_kv_heads), segment_ids


def one_token_at_a_time(q, k, v, segment_ids, scoring, sinks=None):
    """The definition, in float64: each query against the keys it may see, and no others."""
    out, window, cap = np.zeros_like(q, np.float64), scoring.window, scoring.softcap
    group = q.shape[2] // k.shape[2]
    for r, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s for s in range(t + 1) if segment_ids[r, s] == segment_ids[r, t] and (window is None or t - s < window)
        ]
        scores = k[r, seen, n // group].astype(np.float64) @ q[r, t, n] * (scoring.scale or 1 / np.sqrt(H))
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(np.float64(sinks[n])))
        out[r, t, n] = weights @ v[r, seen, n // group] / total
    return out


SINKS = np.array([0.5, -1.0, 3.0, 0.0], np.float32)
SCORINGS = {
    "cap": (Scoring(softcap=1.5), False),
    "sinks": (Scoring(), True),
    "window, sinks": (Scoring(window=5), True),
    "scale, window, cap, sinks": (Scoring(window=40, softcap=2.0, scale=0.9), True),
}


def list_scorings(kernels):
    """Returns the cases `(kernel, scoring, sinks)` of those that can serve them."""
    return [
        pytest.param(kernel, scoring, SINKS if has_sinks else None, id=f"{kernel}: {name}")
        for kernel in kernels
        for name, (scoring, has_sinks) in SCORINGS.items()
        if KERNELS[kernel].find_fault(replace(CASE, softcap=scoring.softcap, sinks=has_sinks)) is None
    ]


@pytest.mark.parametrize("window", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize("row_len", [17, 96, 256])
@pytest.mark.parametrize("kernel", PORTABLE_KERNELS)
def test_every_kernel_attends_to_its_own_segment_and_window(kernel, row_len, window):
    q, k, v, segment_ids = make_inputs(row_len)
    scoring = Scoring(window=window)
    found = attend(kernel, scoring)(q, k, v, segment_ids)
    expected = one_token_at_a_time(q, k, v, segment_ids, scoring)
    real = segment_ids > 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("kernel", "scoring", "sinks"), list_scorings(PORTABLE_KERNELS))
def test_every_kernel_makes_scores_as_it_is_told(kernel, scoring, sinks):
    """Values; and gradients along one direction of each input, by differences in float64."""
    *qkv, segment_ids = make_inputs(96)
    inputs, real = [*qkv, *([] if sinks is None else [sinks])], segment_ids > 0
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(qkv[0].shape) * real[..., None, None]

    def loss(*inputs):
        attended = make_attention(kernel, CASE)(*inputs[:3], segment_ids, scoring, *(inputs[3:] or [None]))
        return (attended * weights.astype(np.float32)).sum(), attended

    (_, found), grads = quick_jit(jax.value_and_grad(loss, range(len(inputs)), has_aux=True))(*inputs)
    define = lambda inputs: one_token_at_a_time(*inputs[:3], segment_ids, scoring, *inputs[3:])
    np.testing.assert_allclose(np.asarray(found)[real], define(inputs)[real], atol=2e-6)
    assert np.isfinite(found).all()
    for i, grad in enumerate(grads):
        step = rng.standard_normal(grad.shape) * 1e-4
        up, down = ([*inputs[:i], inputs[i] + sign * step, *inputs[i + 1 :]] for sign in (1, -1))
        change = ((define(up) - define(down)) * weights).sum() / 2
        np.testing.assert_allclose((np.float64(grad) * step).sum(), change, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kernel", PORTABLE_KERNELS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_shards", [2, 4])
def test_repeating_kv_heads_for_shards_changes_nothing(kernel, num_kv_heads, num_shards):
    q, k, v, segment_ids = make_inputs(24, num_kv_heads)
    alone = attend(kernel)(q, k, v, segment_ids)
    repeated = attend(kernel, layout=make_layout(tp=num_shards))(q, k, v, segment_ids)
    np.testing.assert_allclose(repeated, alone, atol=1e-6)


@pytest.mark.parametrize("kernel", PORTABLE_KERNELS)
@pytest.mark.parametrize("window", [None, 7, 90])
def test_a_bound_on_segments_changes_nothing_where_it_holds(kernel, window):
    q, k, v, segment_ids = make_inputs(192)
    segment_ids[:] = np.arange(192) // 50 + 1
    free = attend(kernel, Scoring(window=window))(q, k, v, segment_ids)
    for bound in (50, 51, 190, 5000):
        bounded = attend(kernel, Scoring(window=window), max_segment_len=bound)(q, k, v, segment_ids)
        np.testing.assert_allclose(bounded, free, atol=1e-6)


@pytest.mark.parametrize("kernel", [name for name in PORTABLE_KERNELS if name != "dense"])
@pytest.mark.parametrize("num_kv_heads", [1, N])
@pytest.mark.parametrize(("row_len", "window"), [(96, None), (96, 20), (320, 65), (320, 64), (640, 120)])
def test_every_kernel_has_the_gradients_of_the_reference(kernel, row_len, window, num_kv_heads):
    """In rows that are cut into blocks and chunks."""
    q, k, v, segment_ids = make_inputs(row_len, num_kv_heads)
    weights = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32) * (segment_ids > 0)[..., None, None]

    sinks = SINKS if window == 64 else None

    def loss(kernel, q, k, v, sinks):
        return (make_attention(kernel, CASE)(q, k, v, segment_ids, Scoring(window=window), sinks) * weights).sum()

    inputs = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    found = quick_jit(jax.grad(partial(loss, kernel), inputs))(q, k, v, sinks)
    expected = quick_jit(jax.grad(partial(loss, "dense"), inputs))(q, k, v, sinks)
    for one, other in zip(found, expected):
        assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(other)


DECODING_KERNELS = tuple(name for name in PORTABLE_KERNELS if KERNELS[name].decoding)
DECODING = replace(CASE, use="decoding")


def decode(kernel, scoring=PLAIN, sinks=None, **options):
    """Returns the compiled kernel for one token a row."""
    return quick_jit(partial(make_decoding(kernel, DECODING), scoring=scoring, sinks=sinks), **options)


@pytest.mark.parametrize("num_kv_heads", [1, K, N])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("kernel", DECODING_KERNELS)
def test_a_token_decoded_is_the_last_of_its_row(kernel, window, num_kv_heads):
    """The cache is longer than the row, and what is behind the row in it does not matter."""
    q, k, v, _ = make_inputs(24, num_kv_heads)
    lengths, rows = np.array([0, 7, 17]), np.arange(3)
    expected = one_token_at_a_time(q, k, v, np.ones((3, 24)), Scoring(window=window))[rows, lengths]
    cache = (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
    found = decode(kernel, Scoring(window=window))(q[rows, lengths], *cache, lengths)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    beyond = np.arange(24) > lengths[:, None]
    cache = (np.where(beyond[:, None, None], 1e3, cache[0]), np.where(beyond[:, None, :, None], 1e3, cache[1]))
    again = decode(kernel, Scoring(window=window))(q[rows, lengths], *cache, lengths)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize(("kernel", "scoring", "sinks"), list_scorings(DECODING_KERNELS))
def test_a_token_decoded_has_scores_as_the_last_of_its_row(kernel, scoring, sinks):
    q, k, v, _ = make_inputs(24)
    lengths, rows = np.array([0, 7, 17]), np.arange(3)
    expected = one_token_at_a_time(q, k, v, np.ones((3, 24)), scoring, sinks)[rows, lengths]
    cache = (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
    found = decode(kernel, scoring, sinks)(q[rows, lengths], *cache, lengths)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("kernel", DECODING_KERNELS)
def test_query_heads_split_over_devices_decode_alike(kernel):
    """Four query heads on four devices, which share two key-value heads: each device has both of them."""
    q, k, v, _ = make_inputs(24)
    layout, lengths = make_layout(tp=4), np.array([3, 23, 11])
    args = (q[:, 0], k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
    alone = decode(kernel)(*args, lengths)
    heads = layout.sharding(None, "tensor")
    spread = jax.device_put(args, (heads, layout.replicated, layout.replicated))
    np.testing.assert_allclose(decode(kernel, out_shardings=heads)(*spread, lengths), alone, atol=1e-6)


@pytest.mark.parametrize("name", [None, *SCORINGS])
@pytest.mark.parametrize("bound", [200, None])
def test_what_is_left_out_before_a_segment_changes_nothing(name, bound):
    """Rows whose blocks see any number of those before them: values and gradients are those of the definition."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((3, 1024, heads, H)).astype(np.float32) for heads in (N, K, K))
    segment_ids = np.zeros((3, 1024), np.int32)
    for row, longest in zip(segment_ids, (200, 60, 130), strict=True):
        lengths = rng.integers(1, longest + 1, 60)
        filled = np.repeat(np.arange(1, 61), lengths)[: 1024 - longest]
        row[: len(filled)] = filled
    segment_ids[0, :200] = 1
    scoring, has_sinks = (PLAIN, False) if name is None else SCORINGS[name]
    weights = rng.standard_normal(q.shape) * (segment_ids > 0)[..., None, None]
    inputs = (q, k, v, *((SINKS,) if has_sinks else ()))

    def run(kernel):
        attention_fn = make_attention(kernel, CASE, max_segment_len=bound)

        def loss(*inputs):
            attended = attention_fn(*inputs[:3], segment_ids, scoring, *(inputs[3:] or [None]))
            return (attended * weights.astype(np.float32)).sum(), attended

        return quick_jit(jax.value_and_grad(loss, range(len(inputs)), has_aux=True))(*inputs)

    ((_, found), grads), ((_, expected), expected_grads) = run("skipping"), run("dense")
    real = segment_ids > 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], atol=3e-6)
    assert np.isfinite(found).all()
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, np.abs(theirs).max()))


def test_devices_leave_out_keys_in_their_own_rows_and_heads():
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((4, 512, heads, H)).astype(np.float32) for heads in (N, K, K))
    segment_ids = np.stack([np.arange(512) // length + 1 for length in (60, 50, 33, 7)]).astype(np.int32)

    def run(**options):
        attention_fn = make_attention("skipping", CASE, max_segment_len=100, **options)
        loss = lambda *qkv: jax.numpy.sin(attention_fn(*qkv, segment_ids, PLAIN, None)).sum()
        return quick_jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    (alone, grads), (split, split_grads) = run(), run(layout=make_layout(dp=2, tp=2))
    np.testing.assert_allclose(split, alone, rtol=1e-5)
    for ours, theirs in zip(split_grads, grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
