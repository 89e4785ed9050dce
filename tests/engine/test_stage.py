"""A function in two halves: the gradients of the whole, and nothing kept that both halves are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.engine.stage import Halves
from realjax.engine.totals import add_after, add_in_place


@pytest.mark.parametrize("add_fn", [add_after, add_in_place])
@pytest.mark.parametrize("remat", [False, True])
def test_halves_have_the_gradients_of_the_whole_and_keep_no_parameters(remat, add_fn):
    rng = np.random.default_rng(0)
    kernels, x = rng.standard_normal((3, 8, 8)), rng.standard_normal((2, 8))

    def layer(x, parts):
        kernel, scale = parts
        return jnp.sin(x @ kernel) * scale, None

    def stack(kernels, scales, x):
        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (kernels, scales))[0]

    @jax.jit
    def in_halves(kernels, totals, scales, x):
        halves = Halves(stack, add_fn)
        y, kept = halves.forward(kernels, scales, x)
        assert not [leaf for leaf in kept if leaf.shape == kernels.shape]
        return y, halves.backward(kernels, kept, totals, y)

    scales = jnp.ones(3)
    y, (totals, grad_x) = in_halves(kernels, 10 * scales, scales, x)
    expected = jax.grad(lambda *args: 0.5 * jnp.sum(stack(kernels, *args) ** 2), argnums=(0, 1))(scales, x)
    np.testing.assert_allclose(y, stack(kernels, scales, x), rtol=1e-6)
    for found, one in zip((totals - 10, grad_x), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-6)
