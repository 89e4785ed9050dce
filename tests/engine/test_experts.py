"""Experts shared by devices: the same losses, gradients and tokens as where each device has all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.aot.hlo import bytes_along, collectives
from realjax.core.axes import train_rules
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout
from realjax.core.trees import flatten_paths
from realjax.engine import experts
from realjax.engine.compiled import place_batch
from realjax.engine.experts import run_in_turns
from realjax.engine.inference import make_evaluation
from realjax.engine.train import TrainOptions, make_gradients
from realjax.models.config import LayerKind, MoEConfig
from realjax.models.products import Routed
from tests.engine.generation_cases import run
from tests.given.compare import assert_close_in_norm
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import make_examples, pack_in_order

CONFIG = MoEConfig(num_experts=8, experts_per_token=3, expert_size=16, renormalise=True, bias=True)
MODEL = make_model(pattern=(LayerKind(feed_forward=CONFIG),))
PARAMS = random_tree(MODEL)
BATCH = pack_in_order(make_examples([9, 30, 17, 3, 22, 8, 14, 12]), 32, num_rows=8)[0]
SLOW = pytest.mark.slow
TRAINED = [
    {"dp": 4, "ep": 4},
    pytest.param({"dp": 4, "ep": 2, "tp": 2, "sp": True, "zero": 3}, marks=SLOW),
    pytest.param({"dp": 2, "ep": 2, "pp": 2, "zero": 1}, marks=SLOW),
]


def compute(make_fn, layout: Layout):
    """Returns what the function of a layout gives of the parameters and the batch."""
    batch = place_batch(BATCH, train_rules(layout.strategy), layout)
    return quick_jit(make_fn)(place_params(MODEL, PARAMS, layout), batch)


def gradients(layout: Layout):
    return compute(make_gradients(MODEL, SFT_LOSS, layout, TrainOptions()), layout)


@pytest.fixture(scope="module")
def expected():
    return gradients(make_layout())


@pytest.fixture
def turns(monkeypatch):
    """Lets devices run few pairs of a token and an expert at once."""
    monkeypatch.setattr(experts, "FEW_PAIRS", 8)


@pytest.mark.parametrize("layout", TRAINED, ids=str)
def test_gradients_do_not_depend_on_who_has_which_experts(layout, expected, turns):
    grads, sums = gradients(make_layout(**layout))
    assert float(sums.loss.value) == pytest.approx(float(expected[1].loss.value), rel=1e-5)
    assert_close_in_norm(grads, expected[0], 1e-5)


def test_what_crosses_is_tokens_there_and_back():
    """Hidden states are gathered and swapped once a layer on the way there, and once on the way back as gradients; the
    numbers of experts are gathered, and their weights there and back. Gradients of all else are summed once."""
    layout = make_layout(dp=4, ep=4)
    batch = place_batch(BATCH, train_rules(layout.strategy), layout)
    fn = quick_jit(make_gradients(MODEL, SFT_LOSS, layout, TrainOptions()))
    found = collectives(fn.lower(place_params(MODEL, PARAMS, layout), batch).compile().as_text())
    layers, tokens = MODEL.config.num_layers, BATCH.num_rows * BATCH.row_len
    states, chosen = 4 * tokens * MODEL.config.hidden_size, 4 * tokens * CONFIG.experts_per_token
    along = partial(bytes_along, found, layout, "expert")
    assert along(kind="all-gather") == layers * (2 * states + 2 * chosen)
    assert along(kind="all-to-all") == layers * (2 * states + chosen)
    # A sum over one device alone, which only an unoptimised program has, crosses nothing.
    assert {one.axes(layout) for one in found} - {()} == {("expert",)}
    whole = sum(x.nbytes for path, x in flatten_paths(PARAMS).items() if "/experts/" not in path or "down/bias" in path)
    assert whole <= along(kind="all-reduce") < 1.05 * whole


def test_losses_of_an_evaluation_do_not_either(expected):
    layout = make_layout(dp=4, ep=2, tp=2)
    sums = compute(make_evaluation(MODEL, SFT_LOSS, layout, Compute()), layout)
    assert float(sums.loss.value) == pytest.approx(float(expected[1].loss.value), rel=1e-5)


def test_greedy_tokens_do_not_either(quick):
    config = GenerationConfig(greedy=True, max_new_tokens=6)
    alone = run(MODEL, PARAMS, config)
    for layout in ({"dp": 4, "ep": 4, "tp": 2}, {"dp": 2, "ep": 2, "pp": 2, "tp": 2}):
        shared = run(MODEL, PARAMS, config, make_layout(**layout))
        for one, other in zip(shared, alone, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_pairs_in_turns_give_what_all_at_once_give(share):
    """A function of pairs that tells them apart, with gradients of all it reads; some pairs have no expert here."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kernels, x, weights = {"up": draw(3, 5, 5)}, draw(40, 5), draw(40, 2)
    ids = jnp.asarray(np.where(rng.random((40, 2)) < share, rng.integers(3, size=(40, 2)), 3))

    def fn(routed: Routed, params) -> jax.Array:
        kernel = jnp.concatenate([params["up"], jnp.zeros((1, 5, 5))])[jnp.minimum(routed.ids, 3)]
        return jnp.einsum("rtd,rtkdc,rtk->rtc", jnp.sin(routed.x), kernel, routed.weights)

    def outcome(most: int):
        of = lambda x, weights, kernels: run_in_turns(fn, Routed(x, ids, weights), kernels, most)
        y, pullback = jax.vjp(of, x, weights, kernels)
        return y, pullback(jnp.cos(y))

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, outcome(7), outcome(1000))
