"""Gradients of micro-batches are added up in place: a step's memory holds them once, not twice."""

import jax
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.compute import Compute
from realjax.engine.compiled import place_batch
from realjax.engine.train import TrainOptions, make_gradients
from tests.given.models import make_layout, make_model, place_params, random_tree
from tests.given.sequences import make_examples, pack_in_order


@pytest.mark.parametrize("layout", [{}, {"pp": 2}, {"dp": 2, "zero": 3}], ids=str)
def test_gradients_of_a_micro_batch_do_not_lie_beside_the_sum(layout):
    model, layout = make_model(num_layers=16, hidden_size=64, ffn_size=256), make_layout(**layout)
    batch = place_batch(pack_in_order(make_examples([8] * 8), 8)[0], train_rules(layout.strategy), layout)
    fn = make_gradients(model, SFT_LOSS, layout, TrainOptions(num_mbs=2, compute=Compute(remat=True)))
    program = jax.jit(fn).lower(place_params(model, random_tree(model), layout), batch).compile()
    # The sums are the program's outputs, and so not among its temporaries.
    size = model.num_params * 4 / layout.strategy.size
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * size
