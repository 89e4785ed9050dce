from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models.config import RopeConfig
from realjax.models.rope import apply_rope, rope_frequencies, rope_tables

LLAMA3 = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=8192)
YARN = RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_max_positions=4096)
LONG = RopeConfig(scaling="longrope", factor=2.0, short_factors=(1.0,) * 8, long_factors=tuple(range(1, 9)))


def rotate(x, positions, rope=RopeConfig()):  # noqa: B008 - frozen
    return np.asarray(apply_rope(x, *rope_tables(rope, x.shape[-1], positions)))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rope_turns_pairs_in_the_complex_plane():
    x, positions = random(2, 5, 3, 8), np.arange(10, dtype=np.int32).reshape(2, 5)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * 10000.0 ** -(np.arange(4) / 4))
    np.testing.assert_allclose(rotate(x, positions), np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


@pytest.mark.parametrize(
    "rope", [RopeConfig(), RopeConfig(scaling="linear", factor=4.0), LLAMA3, YARN, LONG, RopeConfig(fraction=0.5)]
)
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


def test_yarn_keeps_what_turns_often_and_stretches_what_hardly_turns():
    plain, scaled = (np.asarray(rope_frequencies(rope, 128)) for rope in (replace(YARN, scaling="none"), YARN))
    turns = 4096 * plain / (2 * np.pi)
    often, hardly = turns > 40, turns < 0.8
    assert often.any() and hardly.any() and (~often & ~hardly).any()
    np.testing.assert_allclose(scaled[often], plain[often], rtol=1e-6)
    np.testing.assert_allclose(scaled[hardly], plain[hardly] / 4, rtol=1e-6)
    assert (np.diff(scaled) < 0).all() and (scaled <= plain * 1.000001).all()


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_longrope_divides_by_the_long_factors_in_a_model_of_more_positions(factor):
    scaled = rope_frequencies(replace(LONG, factor=factor), 16)
    plain = rope_frequencies(RopeConfig(), 16)
    np.testing.assert_allclose(scaled, plain / np.float32(LONG.long_factors if factor > 1 else LONG.short_factors))


def test_an_attention_factor_is_the_length_of_what_turns():
    x, positions = random(1, 6, 2, 8), np.arange(6, dtype=np.int32)[None]
    turned = rotate(x, positions, replace(RopeConfig(), attention_factor=1.5))
    np.testing.assert_allclose(turned, 1.5 * rotate(x, positions), rtol=1e-5, atol=1e-6)


def test_only_a_fraction_of_a_head_turns():
    x, positions = random(1, 6, 2, 16), np.arange(6, dtype=np.int32)[None]
    turned = rotate(x, positions, RopeConfig(fraction=0.75, attention_factor=1.5))
    np.testing.assert_array_equal(turned[..., 12:], x[..., 12:])
    np.testing.assert_array_equal(turned[..., :12], rotate(x[..., :12], positions, RopeConfig(attention_factor=1.5)))


def test_rope_computes_in_float32_and_returns_bfloat16():
    x = jnp.asarray(random(1, 4, 2, 8), jnp.bfloat16)
    positions = np.array([[0, 1, 1000, 30000]], np.int32)
    low = rotate(x, positions)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), rotate(np.asarray(x, np.float32), positions), atol=0.02)
