"""Gradients are summed in float32, in bfloat16's computation too: however often a token is seen, in any split."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.trees import map_paths
from realjax.data.packing import PackPlan, pack
from realjax.engine.compiled import place_batch
from realjax.engine.forward import ForwardOptions, Precision
from realjax.engine.train import TrainOptions, make_gradients
from realjax.models.sums import add_bias, look_up, scale_by
from tests.builders import FULL, make_layout, make_model, place_params, quick_jit, random_tree, relative_errors


@pytest.mark.parametrize("count", [1024, 65536])
def test_a_sum_over_many_tokens_is_their_number(count):
    ones, small = jnp.ones((count, 1), jnp.bfloat16), jnp.ones(1, jnp.bfloat16)
    tokens = jnp.zeros(count, jnp.int32)
    uses = {
        "table": lambda x: look_up(x[None], tokens),
        "scale": lambda x: scale_by(ones, x),
        "bias": lambda x: add_bias(ones, x),
    }
    for name, use in uses.items():
        grad = jax.grad(lambda x, use=use: use(x).astype(jnp.float32).sum())(small)
        assert float(grad[0]) == count, name


MODELS = {"full": make_model(**FULL), "tied": make_model(tied=True)}


def zipf_batch():
    """32 rows of 256 tokens, of which the most frequent is seen some two thousand times."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.5, (64, 128)), 95).astype(np.int32)
    examples = [{"tokens": row, "loss_mask": np.arange(128) > 0} for row in tokens]
    rows = tuple((2 * i, 2 * i + 1) for i in range(32))
    return pack(examples, PackPlan(row_len=256, rows=rows, lengths=(128,) * 64))


def rounded_params(model):
    """Parameters that bfloat16 holds exactly, small enough that the activations' rounding does not grow."""
    round_off = lambda _, x: np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    return map_paths(round_off, random_tree(model, scale=0.05))


def gradients(model, dtype: str, num_mbs: int, **layout):
    layout = make_layout(**layout)
    options = TrainOptions(forward=ForwardOptions(precision=Precision(compute=dtype)), num_mbs=num_mbs)
    fn = quick_jit(make_gradients(model, SFT_LOSS, layout, options))
    batch = place_batch(zipf_batch(), train_rules(layout.strategy), layout)
    return jax.tree.map(np.asarray, fn(place_params(model, rounded_params(model), layout), batch)[0])


@pytest.fixture(scope="module")
def plain():
    return {name: gradients(model, "float32", 1) for name, model in MODELS.items()}


@pytest.mark.parametrize(
    ("name", "num_mbs", "layout"),
    [
        ("full", 1, {}),
        ("full", 8, {}),
        ("full", 32, {}),
        ("tied", 1, {}),
        ("full", 4, {"dp": 8, "zero": 1}),
        ("full", 2, {"dp": 2, "tp": 2, "sp": True, "zero": 3}),
        ("tied", 2, {"pp": 2, "dp": 2, "tp": 2}),
    ],
    ids=str,
)
def test_bf16_gradients_of_frequent_tokens_are_float32s(name, num_mbs, layout, plain):
    errors = relative_errors(gradients(MODELS[name], "bfloat16", num_mbs, **layout), plain[name])
    assert max(errors.values()) < 0.015, errors


@pytest.mark.parametrize(
    "layout", [{"dp": 4, "tp": 2, "sp": True}, {"dp": 2, "tp": 2, "pp": 2}, {"dp": 8, "zero": 1}], ids=str
)
def test_nothing_of_16_bits_crosses_data_and_gradients_do_once_a_step(layout):
    """Read from the program as the compiler gets it: its CPU backend widens 16-bit sums."""
    layout = make_layout(**layout)
    options = TrainOptions(forward=ForwardOptions(precision=Precision(compute="bfloat16")), num_mbs=2)
    batch = place_batch(zipf_batch(), train_rules(layout.strategy), layout)
    model = MODELS["full"]
    fn = jax.jit(make_gradients(model, SFT_LOSS, layout, options))
    text = fn.lower(place_params(model, rounded_params(model), layout), batch).as_text()
    # Rows are split by hand, so no product or sum inside knows `data`: the replicas' gradients leave in float32.
    results = re.findall(r'manual_axes=\{"data"\}.*?\n    \} : \((.*?)\) -> \((.*?)\)\n', text, re.DOTALL)
    assert len(results) == 1, text[:2000]
    shapes = results[0][1].split(", ")
    assert len(shapes) >= len(jax.tree.leaves(model.abstract)) and all("f32" in shape for shape in shapes), shapes
