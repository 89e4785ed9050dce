"""Log-probabilities and entropies of the recorded draw, and their gradients, are the same in every layout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from realjax.core.axes import train_rules
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.draw import Draw, KeptTokens
from realjax.core.loss import Loss, LossSums
from realjax.core.metrics import Mean
from realjax.engine.compiled import place_batch
from realjax.engine.train import TrainOptions, make_gradients
from tests.given.compare import assert_close_in_norm
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import make_examples, pack_in_order

V = 96
DRAW = Draw(0.7, KeptTokens(V, 12, "kept"))
MODEL = make_model()


def weighted_sum(outputs: Mapping[str, Array], batch: Batch) -> LossSums:
    total = jnp.sum((outputs["logprobs"] + 0.3 * outputs["entropy"]) * batch["advantages"])
    return LossSums(Mean(total, jnp.ones(())), {})


def make_batch() -> Batch:
    """Returns rows whose tokens have sets of up to twelve, with the token in it; one in four has none."""
    rng = np.random.default_rng(0)
    examples = make_examples([9, 30, 17, 3, 22, 8, 14, 26])
    for example in examples:
        n = len(example["tokens"])
        kept = rng.integers(0, V + 1, (n, 12)) * (rng.random((n, 12)) < 0.8)
        kept[:, 5] = example["tokens"] + 1
        example["kept"] = np.where(rng.random((n, 1)) < 0.25, 0, kept).astype(np.int32)
        example["advantages"] = rng.standard_normal(n).astype(np.float32)
    return pack_in_order(examples, 32, num_rows=8)[0]


def gradients(layout, **options):
    loss = Loss("logprobs", weighted_sum, draw=DRAW, needs_entropy=True)
    fn = quick_jit(make_gradients(MODEL, loss, layout, TrainOptions(**options)))
    batch = place_batch(make_batch(), train_rules(layout.strategy), layout)
    grads, sums = fn(place_params(MODEL, random_tree(MODEL), layout), batch)
    return jax.tree.map(np.asarray, grads), float(sums.loss.sum)


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"pp": 2}, pytest.param({"dp": 2, "tp": 2, "pp": 2}, marks=pytest.mark.slow)], ids=str
)
def test_gradients_through_the_recorded_sets_are_those_of_one_device(layout):
    expected, loss = gradients(make_layout())
    chunked = Compute(loss_chunk_tokens=64)
    found, same_loss = gradients(make_layout(**layout), compute=chunked, num_mbs=2)
    assert same_loss == pytest.approx(loss, rel=1e-5)
    assert_close_in_norm(found, expected, 1e-5)
