"""The k largest are those of a full sort, equal numbers and all, and no full sort is made."""

import re

import jax
import numpy as np
import pytest

from realjax.core.largest import largest


@pytest.mark.parametrize(("vocab_size", "k"), [(32000, 200), (5003, 40), (2048, 1), (1000, 300), (64, 64)])
@pytest.mark.parametrize("num_values", [None, 3, 50])
def test_the_largest_are_those_of_a_full_sort(vocab_size, k, num_values):
    rng = np.random.default_rng(vocab_size)
    drawn = rng.normal(size=(3, vocab_size)) if num_values is None else rng.integers(0, num_values, (3, vocab_size))
    logits = drawn.astype(np.float32)
    logits[0, rng.random(vocab_size) < 0.3] = -np.inf  # as removed ones may be
    for found, expected in zip(jax.jit(largest, static_argnums=1)(logits, k), jax.lax.top_k(logits, k), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("vocab_size", "k"), [(32000, 200), (128256, 1000)])
def test_little_of_a_large_vocabulary_is_sorted(vocab_size, k):
    shape = jax.ShapeDtypeStruct((4, vocab_size), np.float32)
    text = jax.jit(largest, static_argnums=1).lower(shape, k).as_text()
    sorted_shapes = re.findall(r"(?:top_k\(.*?|\"stablehlo.sort\".*?dimension = 1.*?)tensor<4x(\d+)x", text, re.DOTALL)
    assert len(sorted_shapes) > 2 and sum(map(int, sorted_shapes)) < vocab_size / 4, sorted_shapes
