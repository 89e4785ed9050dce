"""What cuDNN is told to do on packed rows, and what comes of it where it does what is documented."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.layout import Layout
from realjax.engine.attention import cudnn
from realjax.engine.attention.cudnn import ROOM, cudnn_attention, find_api_fault, find_segments
from realjax.engine.attention.reference import dense_attention
from realjax.engine.manual_axes import on_own_heads
from realjax.models.attention import Scoring
from tests.given.cudnn import emulate_cudnn
from tests.given.models import make_layout, quick_jit

N, K, H = 4, 2, 8


@pytest.fixture(autouse=True, scope="module")
def emulated():
    emulate_cudnn()


def pack_at_random(rng: np.random.Generator, num_rows: int, row_len: int, longest: int) -> np.ndarray:
    """Returns segment ids `[R, T]`: from one segment a row to one a token, with padding behind them or none."""
    segment_ids = np.zeros((num_rows, row_len), np.int32)
    for row in segment_ids:
        usual, end = rng.integers(1, longest + 1), rng.integers(0, row_len + 1) if rng.random() < 0.7 else row_len
        at, segment = 0, 0
        while at < end:
            length, segment = min(int(rng.integers(1, usual + 1)), end - at), segment + 1
            row[at : at + length] = segment
            at += length
    return segment_ids


def draw(seed: int, num_rows: int, row_len: int, num_kv_heads: int = K):
    rng = np.random.default_rng(seed)
    q, k, v, weights = (
        rng.standard_normal((num_rows, row_len, n, H)).astype(np.float32) for n in (N, num_kv_heads, num_kv_heads, N)
    )
    return q, k, v, weights


def by_cudnn(window=None, bound=None):
    def attend(q, k, v, segment_ids, sinks=None):
        return cudnn_attention(q, k, v, segment_ids, Scoring(window=window), sinks, bound)

    return attend


def by_definition(window=None):
    def attend(q, k, v, segment_ids, sinks=None):
        return dense_attention(q, k, v, segment_ids, Scoring(window=window), sinks)

    return attend


def outcome(attend, segment_ids, weights, *inputs):
    """Returns values and gradients of q, k, v and sinks, if any; the values of padding left out."""
    is_token = (segment_ids > 0)[..., None, None]

    def loss(q, k, v, *sinks):
        attended = attend(q, k, v, segment_ids, *sinks)
        return (jnp.where(is_token, attended, 0) * weights).sum(), attended

    (_, attended), grads = quick_jit(jax.value_and_grad(loss, range(len(inputs)), has_aux=True))(*inputs)
    return np.where(is_token, attended, 0), *grads


@pytest.mark.parametrize("seed", range(12))
def test_any_packing_agrees_with_the_definition(seed):
    """Values and gradients: whatever is packed, bounded and seen, with or without sinks, in any number of groups."""
    rng = np.random.default_rng(seed)
    num_rows, row_len = int(rng.integers(1, 4)), int(rng.choice([24, 60, 96]))
    longest = int(rng.choice([row_len, row_len // 2, row_len // 4]))
    window = None if seed % 3 else int(rng.integers(1, longest + 2))
    bound = None if longest == row_len else longest
    segment_ids = pack_at_random(rng, num_rows, row_len, longest)
    q, k, v, weights = draw(seed, num_rows, row_len, int(rng.choice([1, 2, 4])))
    sinks = [] if seed % 2 else [rng.standard_normal(N).astype(np.float32)]
    found = outcome(by_cudnn(window=window, bound=bound), segment_ids, weights, q, k, v, *sinks)
    expected = outcome(by_definition(window=window), segment_ids, weights, q, k, v, *sinks)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("num_segments", [8, 9, 16, 17, 32])
def test_segments_that_no_call_has_room_for_go_into_more(num_segments):
    """At the borders of groups: two rows of one longest segment are groups of 2 ROOM = 8."""
    segment_ids = np.repeat(np.arange(num_segments) % 16 + 1, 2)
    segment_ids = np.concatenate([segment_ids, np.zeros(64 - len(segment_ids), int)]).reshape(2, 32).astype(np.int32)
    segments = find_segments(jnp.asarray(segment_ids), 2 * ROOM)
    assert segments.num_groups == -(-num_segments // 8)
    q, k, v, weights = draw(0, 2, 32)
    found = outcome(by_cudnn(), segment_ids, weights, q, k, v)
    expected = outcome(by_definition(), segment_ids, weights, q, k, v)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_padding_is_zero_and_nothing_else_of_it_is_read():
    """The calls leave padding as memory was: NaN here, which one product would spread."""
    segment_ids = np.array([[1] * 9 + [0] * 15, [0] * 24, [1] * 10 + [2] * 14], np.int32)
    q, k, v, weights = draw(0, 3, 24)
    padding = (segment_ids == 0)[..., None, None]
    q, k, v = (np.where(padding, np.nan, x) for x in (q, k, v))
    attended, *grads = outcome(by_cudnn(), segment_ids, weights, q, k, v)
    assert np.isfinite(attended).all() and all(np.isfinite(grad).all() for grad in grads)
    assert all((np.where(padding, grad, 0) == 0).all() for grad in grads)
    assert (np.asarray(by_cudnn()(q, k, v, segment_ids))[segment_ids == 0] == 0).all()


def test_a_segment_longer_than_the_bound_is_nan_and_not_wrong():
    segment_ids = np.array([[1] * 8 + [2] * 9 + [3] * 7], np.int32)
    q, k, v, weights = draw(0, 1, 24)
    for bound, is_fine in ((9, True), (8, False), (3, False)):
        found = outcome(by_cudnn(bound=bound), segment_ids, weights, q, k, v)
        assert all(np.isfinite(x).all() == is_fine for x in found)
        assert is_fine or np.isnan(found[0]).all()


def test_rows_of_too_many_numbers_go_in_parts(monkeypatch):
    segment_ids = pack_at_random(np.random.default_rng(0), 6, 24, 9)
    q, k, v, weights = draw(0, 6, 24)
    whole = outcome(by_cudnn(window=5, bound=9), segment_ids, weights, q, k, v)
    monkeypatch.setattr(cudnn, "MOST_NUMBERS", 2 * 24 * N * H)
    traced = str(jax.make_jaxpr(by_cudnn(window=5, bound=9))(q, k, v, segment_ids))
    assert "dot_product_attention_fwd" in traced and f"f32[2,24,{N},{H}]" in traced
    for one, other in zip(outcome(by_cudnn(window=5, bound=9), segment_ids, weights, q, k, v), whole):
        np.testing.assert_allclose(one, other, atol=1e-6)
    monkeypatch.setattr(cudnn, "MOST_NUMBERS", 24 * N * H - 1)
    with pytest.raises(ValueError, match="counts in 32 bits, found rows of 24 x 4 x 8 numbers a device; use shorter"):
        by_cudnn(window=5, bound=9)(q, k, v, segment_ids)


@pytest.mark.parametrize("layout", [make_layout(dp=2, tp=2), make_layout(tp=4), make_layout(dp=4)], ids=str)
def test_devices_attend_to_their_own_rows_and_heads(layout: Layout):
    """Each with the lists of its own rows; four query heads share four key-value heads."""
    segment_ids = pack_at_random(np.random.default_rng(3), 4, 24, 12)
    q, k, v, weights = draw(0, 4, 24, num_kv_heads=4)
    sinks = np.array([0.5, -1.0, 3.0, 0.0], np.float32)
    placed = jax.device_put((q, k, v), layout.sharding("data", None, "tensor"))
    found = outcome(on_own_heads(by_cudnn(), layout), segment_ids, weights, *placed, sinks)
    expected = outcome(by_definition(), segment_ids, weights, q, k, v, sinks)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_this_jax_has_the_calls():
    assert find_api_fault() is None


class Changed:
    """JAX's module with another thing in the place of one."""

    def __init__(self, **changes):
        self.changes = changes

    def __getattr__(self, name):
        if self.__dict__["changes"].get(name, name) is None:
            raise AttributeError(f"module has no attribute '{name}'")
        return self.__dict__["changes"].get(name) or getattr(REAL, name)


REAL = cudnn.load_calls()


def lowering_with_another_option(ctx, query, key, value, *others, scale, dropout):
    raise AssertionError("looked at only")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_dot_product_attention_fwd_p": None}, "and JAX .* has another: module has no attribute"),
        ({"_dot_product_attention_bwd_cuda_lowering": None}, "and JAX .* has another: module has no attribute"),
        ({"MaskType": SimpleNamespace(CAUSAL=2)}, "masks and layouts that .* does not name"),
        (
            {"_dot_product_attention_bwd_cuda_lowering": lowering_with_another_option},
            "dropout, .* of its bwd call",
        ),
    ],
)
def test_another_jax_is_said_to_be_one(changes, words, monkeypatch):
    monkeypatch.setattr(cudnn, "load_calls", lambda: Changed(**changes))
    fault = find_api_fault()
    assert fault and re.search(words, fault)


def test_a_jax_without_the_module_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(cudnn, "MODULE", "jax._src.cudnn.moved")
    fault = find_api_fault()
    assert fault and "No module named" in fault
