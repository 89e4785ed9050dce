import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realjax.models.config import NormConfig, RopeConfig
from realjax.models.layers import LayerNorm, Linear, RMSNorm, apply_rope, make_norm, rope_frequencies, rope_tables
from realjax.models.products import Products

LLAMA3 = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=8192)


def rotate(x, positions, rope=RopeConfig()):  # noqa: B008 - frozen
    return np.asarray(apply_rope(x, *rope_tables(rope, x.shape[-1], positions)))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rope_turns_pairs_in_the_complex_plane():
    x, positions = random(2, 5, 3, 8), np.arange(10, dtype=np.int32).reshape(2, 5)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * 10000.0 ** -(np.arange(4) / 4))
    np.testing.assert_allclose(rotate(x, positions), np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig(scaling="linear", factor=4.0), LLAMA3])
def test_scores_depend_on_distances_only(rope):
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)
    score = lambda t, s: (rotate(q, np.array([[t]]), rope) * rotate(k, np.array([[s]]), rope)).sum()
    for t, s in [(5, 2), (9, 0), (3, 3)]:
        assert score(t, s) == pytest.approx(score(t + 100, s + 100), abs=1e-4)


def test_linear_scaling_divides_positions():
    x, positions = random(1, 6, 1, 8), np.arange(6, dtype=np.int32)[None]
    scaled = rotate(x, 4 * positions, RopeConfig(scaling="linear", factor=4.0))
    np.testing.assert_allclose(scaled, rotate(x, positions), atol=1e-6)


def test_llama3_scaling_keeps_short_waves_stretches_long_ones_and_is_monotone_between():
    plain = np.asarray(rope_frequencies(RopeConfig(theta=5e5), 128))
    scaled = np.asarray(rope_frequencies(LLAMA3, 128))
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert short.any() and long.any() and (~short & ~long).any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all() and (scaled <= plain).all() and (scaled * 8 >= plain * 0.999999).all()


def test_rms_norm_forgets_the_scale_of_its_input_and_keeps_its_dtype():
    norm, x = RMSNorm(16, NormConfig(eps=1e-12)), random(3, 16)
    norm.scale[...] = jnp.asarray(random(16, seed=1))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True)) * random(16, seed=1)
    for scale in (1.0, 1e-3, 300.0):
        np.testing.assert_allclose(norm(jnp.asarray(x * scale), Products()), expected, rtol=1e-5)


def test_rms_norm_sums_in_float32():
    # A bfloat16 sum of 4,096 ones stops growing at 256.
    norm = RMSNorm(4096, NormConfig(eps=1e-6))
    norm.scale[...] = jnp.ones(4096)
    np.testing.assert_allclose(norm(jnp.ones((1, 4096), jnp.bfloat16), Products()), 1, rtol=1e-2)


def test_layer_norm_forgets_scale_and_offset_of_its_input():
    norm, x = LayerNorm(16, NormConfig(kind="layer", eps=1e-12)), random(3, 16)
    norm.scale[...], norm.bias[...] = jnp.asarray(random(16, seed=1)), jnp.asarray(random(16, seed=2))
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * random(16, seed=1) + random(16, seed=2)
    for scale, offset in ((1.0, 0.0), (1e-3, 0.01), (300.0, -1000.0)):
        np.testing.assert_allclose(norm(jnp.asarray(x * scale + offset), Products()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [NormConfig(one_plus=True), NormConfig(kind="layer")], ids=str)
def test_these_norms_of_16_bits_are_rounded_once(config):
    """Neither 1 + w nor what is normed is a 16-bit number on the way: then half of the results would be off by one."""
    norm = make_norm(256, config)
    state = nnx.state(norm)
    low = jax.tree.map(lambda p: jnp.asarray(0.3 * random(*p.shape, seed=p.ndim), jnp.bfloat16), state)
    x = jnp.asarray(random(50, 256), jnp.bfloat16)
    graphdef = nnx.graphdef(norm)
    found = nnx.merge(graphdef, low)(x, Products())
    exact = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(jnp.float32), low))(x.astype(jnp.float32), Products())
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found) == np.asarray(exact.astype(jnp.bfloat16))).mean() > 0.999


def test_linear_maps_any_number_of_dims_and_adds_its_bias():
    layer = Linear({"q_heads": 3, "head_dim": 4}, {"embed": 5}, bias=True)
    assert layer.kernel.shape == (3, 4, 5) and layer.bias.shape == (5,)
    layer.kernel[...], layer.bias[...] = jnp.asarray(random(3, 4, 5)), jnp.asarray(random(5, seed=1))
    x = random(2, 7, 3, 4, seed=2)
    expected = np.einsum("RTNH,NHD->RTD", x, random(3, 4, 5)) + random(5, seed=1)
    np.testing.assert_allclose(layer(jnp.asarray(x), Products()), expected, rtol=1e-4, atol=1e-5)
    assert Linear({"embed": 5}, {"ffn": 2}).bias is None


def test_rope_and_norm_compute_in_float32_and_return_bfloat16():
    x = random(1, 4, 2, 8)
    positions = np.array([[0, 1, 1000, 30000]], np.int32)
    low = rotate(jnp.asarray(x, jnp.bfloat16), positions)
    assert low.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(low.astype(np.float32), rotate(rounded, positions), atol=0.02)
    norm = jax.tree.map(lambda p: p.astype(jnp.bfloat16), RMSNorm(8, NormConfig(eps=1e-6)))
    assert norm(jnp.asarray(x, jnp.bfloat16), Products()).dtype == jnp.bfloat16
