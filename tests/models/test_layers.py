import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realjax.models.config import NormConfig
from realjax.models.layers import LayerNorm, Linear, RMSNorm, make_norm, scale_by_number
from realjax.models.products import Products


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm_forgets_the_scale_of_its_input_and_keeps_its_dtype():
    norm, x = RMSNorm({"norm": 16}, NormConfig(eps=1e-12)), random(3, 16)
    norm.scale[...] = jnp.asarray(random(16, seed=1))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True)) * random(16, seed=1)
    for scale in (1.0, 1e-3, 300.0):
        np.testing.assert_allclose(norm(jnp.asarray(x * scale), Products()), expected, rtol=1e-5)


def test_rms_norm_sums_in_float32():
    # A bfloat16 sum of 4,096 ones stops growing at 256.
    norm = RMSNorm({"norm": 4096}, NormConfig(eps=1e-6))
    norm.scale[...] = jnp.ones(4096)
    np.testing.assert_allclose(norm(jnp.ones((1, 4096), jnp.bfloat16), Products()), 1, rtol=1e-2)


def test_layer_norm_forgets_scale_and_offset_of_its_input():
    norm, x = LayerNorm({"norm": 16}, NormConfig(kind="layer", eps=1e-12)), random(3, 16)
    norm.scale[...], norm.bias[...] = jnp.asarray(random(16, seed=1)), jnp.asarray(random(16, seed=2))
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * random(16, seed=1) + random(16, seed=2)
    for scale, offset in ((1.0, 0.0), (1e-3, 0.01), (300.0, -1000.0)):
        np.testing.assert_allclose(norm(jnp.asarray(x * scale + offset), Products()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [NormConfig(one_plus=True), NormConfig(kind="layer")], ids=str)
def test_these_norms_of_16_bits_are_rounded_once(config):
    """Neither 1 + w nor what is normed is a 16-bit number on the way: then half of the results would be off by one."""
    norm = make_norm({"norm": 256}, config)
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


def test_rms_norm_of_several_dims_is_over_all_of_them():
    norm, x = RMSNorm({"q_heads": 3, "head_dim": 4}, NormConfig(eps=1e-12)), random(2, 5, 3, 4)
    norm.scale[...] = jnp.asarray(random(3, 4, seed=1))
    expected = x / np.sqrt((x**2).mean((-2, -1), keepdims=True)) * random(3, 4, seed=1)
    np.testing.assert_allclose(norm(jnp.asarray(x), Products()), expected, rtol=1e-5)


def test_norm_computes_in_float32_and_returns_bfloat16():
    norm = jax.tree.map(lambda p: p.astype(jnp.bfloat16), RMSNorm({"norm": 8}, NormConfig(eps=1e-6)))
    assert norm(jnp.asarray(random(1, 4, 2, 8), jnp.bfloat16), Products()).dtype == jnp.bfloat16


def test_a_number_is_not_rounded_to_the_type_that_it_scales():
    x = jnp.asarray([1000.0, 3.0], jnp.bfloat16)
    np.testing.assert_array_equal(scale_by_number(x, 0.1), (np.float32([1000, 3]) * np.float32(0.1)).astype(x.dtype))
