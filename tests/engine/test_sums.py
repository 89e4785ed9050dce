"""Sums over tokens and devices are float32, whatever the compute dtype."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean
from realjax.core.trees import Tree
from realjax.engine.compiled import place_batch
from realjax.engine.train import TrainOptions, make_gradients
from realjax.models import sums
from realjax.models.build import Model, init_params
from tests.given.compare import relative_errors
from tests.given.models import FULL, LEARNED, make_layout, make_model, place_params, quick_jit
from tests.given.sequences import pack_in_order
from tests.hlo import reductions

# Some thousand tokens, of which the commonest is one in four: a sum in bfloat16 would stop at 256.
NUM_ROWS, ROW_LEN = 64, 128
LAYOUTS = [
    {},
    {"dp": 8},
    {"dp": 4, "zero": 1},
    {"dp": 2, "tp": 2, "sp": True, "zero": 3},
    {"pp": 2, "dp": 2, "tp": 2, "sp": True},
]


def values_of(outputs, batch) -> LossSums:
    mask = batch["loss_mask"].astype(jnp.float32)
    return LossSums(Mean(jnp.sum(outputs["values"] * mask), jnp.sum(mask)), {})


def logprobs_of(outputs, batch) -> LossSums:
    mask = batch["loss_mask"].astype(jnp.float32)
    return LossSums(Mean(-jnp.sum(outputs["logprobs"] * mask), jnp.sum(mask)), {})


MODELS = {
    "biases": (make_model(**FULL), SFT_LOSS),
    "tied": (make_model(tied=True), Loss(head="logprobs", fn=logprobs_of)),
    "learned": (make_model(**LEARNED, embed_scale=3.0, logit_softcap=4.0), SFT_LOSS),
    "critic": (make_model(is_critic=True), Loss(head="values", fn=values_of)),
}


def zipf_batch() -> Batch:
    """Returns packed rows of tokens as unlike in number as a text's."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, ROW_LEN // 2, 2 * NUM_ROWS)
    examples = [
        {"tokens": np.minimum(rng.zipf(1.4, n), 95).astype(np.int32), "loss_mask": np.arange(n) > 0} for n in lengths
    ]
    return pack_in_order(examples, ROW_LEN, num_rows=NUM_ROWS)[0]


BATCH = zipf_batch()


def start(model: Model) -> Tree:
    """Returns host parameters as a training begins with, rounded as the compute copy is."""
    one = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), model.abstract)
    params = init_params(model, one, seed=0)
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)), params)


def gradients(name: str, dtype: str, layout: dict, num_mbs: int = 1, **options) -> Tree:
    model, loss = MODELS[name]
    placed = make_layout(**layout)
    compute = Compute(dtype=dtype, **options)
    fn = quick_jit(make_gradients(model, loss, placed, TrainOptions(num_mbs=num_mbs, compute=compute)))
    grads, _ = fn(place_params(model, start(model), placed), place_batch(BATCH, train_rules(placed.strategy), placed))
    return jax.tree.map(np.asarray, grads)


@cache
def exact(name: str) -> Tree:
    return gradients(name, "float32", {})


# Each model as a whole, in stages and in another layout; how micro-batches and devices add up, on the first alone.
CASES = [
    *(("biases", layout, num_mbs) for layout, num_mbs in (({}, 1), ({}, 32), *((layout, 4) for layout in LAYOUTS[1:]))),
    *((name, LAYOUTS[i], num_mbs) for name in ("tied", "learned", "critic") for i, num_mbs in ((0, 1), (4, 4))),
    ("tied", LAYOUTS[3], 4),
    ("critic", LAYOUTS[1], 8),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "num_mbs"), CASES, ids=str)
def test_gradients_in_bfloat16_are_those_of_float32_for_tokens_seen_thousands_of_times(name, layout, num_mbs):
    errors = relative_errors(gradients(name, "bfloat16", layout, num_mbs, loss_chunk_tokens=1024), exact(name))
    assert max(errors.values()) < 0.015, errors


@pytest.mark.parametrize("count", [1024, 65_536])
def test_a_sum_over_many_tokens_is_their_number(count):
    ones, small = jnp.ones((count, 1), jnp.bfloat16), jnp.ones(1, jnp.bfloat16)
    tokens = jnp.zeros(count, jnp.int32)
    uses = {
        "table": lambda x: sums.look_up(x[None], tokens),
        "kernel": lambda x: sums.matmul(ones, x[None]),
        "scale": lambda x: sums.scale_by(ones, x),
        "bias": lambda x: sums.add_bias(ones, x),
    }
    for name, use in uses.items():
        grad = jax.grad(lambda x, use=use: use(x).astype(jnp.float32).sum())(small)
        assert float(grad[0]) == count, name


@pytest.mark.parametrize(
    ("name", "layout"),
    # Every kind of parameter with data in parallel and in stages; what else there is, with all of them or some.
    [*((name, LAYOUTS[i]) for name in MODELS for i in (3, 4)), ("biases", LAYOUTS[1]), ("tied", LAYOUTS[2])],
    ids=str,
)
def test_nothing_of_16_bits_is_summed_over_data(name, layout):
    model, loss = MODELS[name]
    placed = make_layout(**layout)
    options = TrainOptions(num_mbs=2, compute=Compute(dtype="bfloat16"))
    params = place_params(model, start(model), placed)
    batch = place_batch(BATCH, train_rules(placed.strategy), placed)
    found = reductions(make_gradients(model, loss, placed, options), params, batch)
    # Devices are numbered pipe by data by tensor.
    s = placed.strategy
    replica = np.arange(s.size) // s.tp % s.dp
    over_data = [one for one in found if (np.ptp(replica[one.groups], axis=1) > 0).any()]
    assert over_data and not [one for one in over_data if one.dtype in ("bf16", "f16")]
