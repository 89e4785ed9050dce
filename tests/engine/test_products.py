"""What a platform computes in its own way is what the plain products give, with their gradients."""

from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realjax.core.axes import train_rules
from realjax.core.layout import Layout, ParallelStrategy
from realjax.engine import groups
from realjax.engine.products import make_products, merge_tokens, multiply_flat, read_table, unrolls_layers
from realjax.models.config import NormConfig
from realjax.models.layers import LayerNorm, Linear, RMSNorm
from realjax.models.products import Products, tied_logits
from realjax.models.sums import grouped_matmul
from tests.given.compare import assert_close_in_norm
from tests.given.models import make_layout, quick_jit

R, T, D, N, H = 3, 5, 8, 4, 6
PLAIN = Products()
ON_CPU = make_products(train_rules(ParallelStrategy()), make_layout())


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def value_and_grads(fn, *args):
    """Returns `fn(*args)` and the gradients of its sum, weighted at random."""
    value = quick_jit(fn)(*args)
    weights = random(*value.shape, seed=9)
    grads = quick_jit(jax.grad(lambda *args: (fn(*args) * weights).sum(), tuple(range(len(args)))))(*args)
    return {"value": value, "grads": {str(i): grad for i, grad in enumerate(grads)}}


def run(module: nnx.Module, products: Products, x: np.ndarray, time: str):
    """Returns the module's output and gradients for random parameters."""
    graphdef, state = nnx.split(module)
    params = jax.tree.map(lambda leaf: random(*leaf.shape, seed=leaf.ndim), nnx.to_pure_dict(state))
    return value_and_grads(lambda x, params: nnx.merge(graphdef, params)(x, products, time), x, params)


MODULES = {
    "in heads": lambda: (Linear({"embed": D}, {"q_heads": N, "head_dim": H}, bias=True), random(R, T, D)),
    "out of heads": lambda: (Linear({"q_heads": N, "head_dim": H}, {"embed": D}), random(R, T, N, H)),
    "norm over heads": lambda: (RMSNorm({"q_heads": N, "head_dim": H}, NormConfig()), random(R, T, N, H)),
    "plain": lambda: (Linear({"embed": D}, {"ffn": 7}), random(R, T, D)),
    "norm": lambda: (RMSNorm({"norm": D}, NormConfig()), random(R, T, D)),
    "norm of heads": lambda: (RMSNorm({"head_dim": H}, NormConfig()), random(R, T, N, H)),
    "layer norm": lambda: (LayerNorm({"norm": D}, NormConfig(kind="layer")), random(R, T, D)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_compute_on_cpus_what_the_plain_products_give(name):
    for time in ("time", "residual_time"):
        module, x = MODULES[name]()
        assert_close_in_norm(run(module, ON_CPU, x, time), run(module, PLAIN, x, time), 1e-6)


def test_a_tied_head_gives_the_same_logits():
    args = random(R, D), random(11, D, seed=1)
    assert_close_in_norm(value_and_grads(read_table, *args), value_and_grads(tied_logits, *args), 1e-6)


def test_what_layers_share_is_the_same_to_the_bit_and_no_loop_computes_it_again():
    angles = 1e3 * random(R, T, D)

    def read_twice(share):
        def fn(angles, x):
            table = share(jnp.cos(angles))
            return jnp.tanh(x @ (x.T @ (x @ table[0].T))) * table.sum(), x * table

        return quick_jit(fn)

    args = angles, random(T, D, seed=1)
    np.testing.assert_array_equal(quick_jit(lambda x: ON_CPU.share(jnp.cos(x)))(angles), quick_jit(jnp.cos)(angles))
    counts = [
        read_twice(share).lower(*args).compile().as_text().count(" cosine(") for share in (ON_CPU.share, lambda x: x)
    ]
    assert counts == [1, 3]


def test_tokens_are_merged_but_where_the_row_is_split():
    shapes = []

    def note(x):
        shapes.append(x.shape)
        return x

    for sequence_parallel in (False, True):
        strategy = ParallelStrategy(tp=2, sequence_parallel=sequence_parallel)
        products = make_products(train_rules(strategy), make_layout(tp=2))
        for time in ("time", "residual_time"):
            assert products.over_tokens(note, jnp.ones((R, T, D)), time).shape == (R, T, D)
    assert shapes == [(R * T, D), (R * T, D), (R * T, D), (R, T, D)]


@pytest.mark.parametrize("count", [1024, 65_536])
def test_a_16_bit_kernels_gradient_over_many_tokens_is_their_number(count):
    ones, small = jnp.ones((1, count, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)
    product = lambda kernel: merge_tokens(lambda x: multiply_flat(x, kernel), ones).astype(jnp.float32).sum()
    assert float(jax.grad(product)(small)[0, 0]) == count


def test_an_accelerator_gets_the_plain_products_and_a_loop_over_layers():
    layout = Layout(ParallelStrategy(), (Mock(jax.Device, platform="gpu"),))
    products = make_products(train_rules(layout.strategy), layout)
    of_experts = {"grouped_matmul": products.grouped_matmul, "over_experts": products.over_experts}
    assert products == Products(**of_experts)
    assert not unrolls_layers(layout, remat=False)
    assert unrolls_layers(make_layout(), remat=False) and not unrolls_layers(make_layout(), remat=True)


@pytest.mark.parametrize("form", ["on CPUs", "on accelerators"])
@pytest.mark.parametrize("sizes", [(5, 0, 150, 7), (0, 0, 0, 200), (50, 50, 50, 50), (0, 0, 0, 0), (64, 64, 1, 0)])
def test_products_of_groups_are_those_of_each_group_alone(form, sizes, monkeypatch):
    """Behind the groups are rows of none: they give 0, and so do their gradients."""
    monkeypatch.setattr(groups, "FEW_ROWS", 0)
    accelerated = partial(grouped_matmul, group_fn=groups.multiply_padded, group_sum_fn=groups.sum_padded)
    fn = ON_CPU.grouped_matmul if form == "on CPUs" else accelerated
    x, kernels, ends = random(200, D), random(4, D, N, seed=1), np.cumsum(sizes)

    def plain(x, kernels):
        parts = [x[end - size : end] @ kernel for size, end, kernel in zip(sizes, ends, kernels)]
        return jnp.concatenate([*parts, jnp.zeros((200 - ends[-1], N))])

    found = value_and_grads(lambda x, kernels: fn(x, kernels, jnp.array(sizes)), x, kernels)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, value_and_grads(plain, x, kernels))
