"""A mixture of experts is what plain loops over tokens and experts compute in float64, with all gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realjax.core.axes import Constrain, train_rules
from realjax.core.layout import ParallelStrategy
from realjax.engine.products import make_products
from realjax.models.attention import BlockContext
from realjax.models.config import MoEConfig
from realjax.models.moe import MoE, measure_balance
from realjax.models.products import Products
from tests.given.compare import assert_close_in_norm
from tests.given.models import make_layout, make_model, quick_jit

R, T, D = 2, 7, 16
SIZES = make_model(hidden_size=D).config
SOFTMAX = MoEConfig(num_experts=5, experts_per_token=2, expert_size=12)
CONFIGS = {
    "softmax": SOFTMAX,
    "renormalised": replace(SOFTMAX, renormalise=True, experts_per_token=3, shared_size=20, shared_gate=True),
    "groups": MoEConfig(
        num_experts=8,
        experts_per_token=2,
        expert_size=12,
        scores="sigmoid",
        renormalise=True,
        scale=2.5,
        has_offset=True,
        num_groups=4,
        groups_per_token=2,
        shared_size=12,
    ),
    "gpt-oss": replace(
        SOFTMAX, scores="softmax_of_chosen", router_bias=True, bias=True, limit=1.0, alpha=1.702, experts_per_token=4
    ),
}
ON_CPU = make_products(train_rules(ParallelStrategy()), make_layout())
IS_TOKEN = np.arange(T) < np.array([[T], [4]])


def context(products: Products) -> BlockContext:
    return BlockContext(
        rotations={},
        segment_ids=jnp.asarray(IS_TOKEN, jnp.int32),
        attend_fn=lambda q, k, v, window: q,
        constrain=Constrain(),
        products=products,
    )


def make(config: MoEConfig):
    """Returns the module's recipe, its parameters and an input, all random."""
    graphdef, state = nnx.split(MoE(SIZES, config))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return graphdef, jax.tree.map(lambda leaf: 0.5 * draw(*leaf.shape), nnx.to_pure_dict(state)), draw(R, T, D)


def find_best(scores, num: int):
    """Returns the mask of the `num` largest of each row."""
    return jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1) < num


def choose(config: MoEConfig, scores):
    """Returns the mask `[N, E]` of each token's experts."""
    if config.num_groups > 1:
        groups = scores.reshape(len(scores), config.num_groups, -1)
        is_kept = find_best(jnp.sort(groups, axis=-1)[..., -2:].sum(axis=-1), config.groups_per_token)
        scores = jnp.where(is_kept[..., None], groups, -jnp.inf).reshape(scores.shape)
    return find_best(scores, config.experts_per_token)


def plain_moe(config: MoEConfig, params, x):
    """Returns what tokens `[N, D]` become: every expert sees all of them, and its choice is a mask."""
    router, experts = params["router"], params["experts"]
    logits = x @ router["kernel"] + router.get("bias", 0.0)
    of_all = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "softmax_of_chosen": lambda x: x}[config.scores]
    scores = of_all(logits)
    is_chosen = choose(config, jax.lax.stop_gradient(scores + router.get("offset", 0.0)))
    if config.scores == "softmax_of_chosen":
        scores = jax.nn.softmax(jnp.where(is_chosen, logits, -jnp.inf))
    weights = jnp.where(is_chosen, scores, 0.0)
    if config.renormalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    y = jnp.zeros_like(x)
    for e in range(config.num_experts):
        product = lambda name, x, e=e: x @ experts[name]["kernel"][e] + (experts[name]["bias"][e] if config.bias else 0)
        gate, up = product("gate", x), product("up", x)
        if config.limit is not None:
            gate, up = jnp.minimum(gate, config.limit), jnp.clip(up, -config.limit, config.limit)
            hidden = (up + 1) * gate * jax.nn.sigmoid(gate * config.alpha)
        else:
            hidden = jax.nn.silu(gate) * up
        y = y + config.scale * weights[:, e, None] * product("down", hidden)
    if "shared" in params:
        shared = {name: leaf["kernel"] for name, leaf in params["shared"].items()}
        own = (jax.nn.silu(x @ shared["gate"]) * (x @ shared["up"])) @ shared["down"]
        y = y + own * (jax.nn.sigmoid(x @ shared["router"]) if config.shared_gate else 1.0)
    return y


@pytest.mark.parametrize("products", [Products(), ON_CPU], ids=["plain", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_a_loop_over_experts(name, products):
    config = CONFIGS[name]
    graphdef, params, x = make(config)
    weights = np.random.default_rng(1).standard_normal((R, T, D)).astype(np.float32) * IS_TOKEN[..., None]
    loss = lambda params, x: jnp.sum(nnx.merge(graphdef, params)(x, context(products))[0] * weights)
    value, grads = quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    with jax.enable_x64(True):
        plain = lambda params, x: jnp.sum(plain_moe(config, params, x.reshape(-1, D)) * weights.reshape(-1, D))
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, x))
        expected, expected_grads = quick_jit(jax.value_and_grad(plain, argnums=(0, 1)))(*wide)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    found, expected = (jax.tree.map(np.asarray, {"x": of_x, **rest}) for rest, of_x in (grads, expected_grads))
    assert not np.any(found["router"].pop("offset", 0)) and not np.any(expected["router"].pop("offset", 0))
    assert_close_in_norm(found, expected, 1e-5)


def test_padding_has_no_expert_and_changes_nothing():
    config = CONFIGS["gpt-oss"]
    graphdef, params, x = make(config)
    run = quick_jit(lambda x: nnx.merge(graphdef, params)(x, context(ON_CPU))[0])
    y, other = run(x), run(np.where(IS_TOKEN[..., None], x, 9.0))
    np.testing.assert_array_equal(np.asarray(y)[IS_TOKEN], np.asarray(other)[IS_TOKEN])
    assert not np.any(np.asarray(y)[~IS_TOKEN])


def test_the_balance_of_a_sequence_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    logits = np.random.default_rng(0).standard_normal((2, 9, 6)).astype(np.float32)
    segment_ids = np.array([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2])
    counts = find_best(jnp.asarray(logits), 2).astype(np.float32) * (segment_ids > 0)[..., None]
    found = np.asarray(measure_balance(jax.nn.softmax(logits), counts, jnp.asarray(segment_ids)))
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        own = segment_ids[row] == segment
        theirs = load_balancing_loss_func((torch.from_numpy(logits[row, own]),), 6, 2)
        assert found[row, own].mean() == pytest.approx(float(theirs), rel=1e-5)
