"""A kernel that XLA cannot split runs on each device's own rows and heads, in every layout of a whole model."""

import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.compute import Compute
from realjax.engine.attention import choose
from realjax.engine.attention.choose import Kernel
from realjax.engine.attention.cudnn import cudnn_attention
from realjax.engine.attention.reference import dense_attention
from realjax.engine.compiled import place_batch
from realjax.engine.train import TrainOptions, make_gradients
from tests.given.compare import assert_close_in_norm
from tests.given.cudnn import emulate_cudnn
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import make_examples, pack_in_order

MODEL = make_model(window=20, sinks=True)
BATCH = pack_in_order(make_examples([9, 30, 17, 3, 22, 8, 14]), 32, num_rows=8)[0]
HEADS = {"rows": 8, "q": MODEL.config.num_q_heads, "kv": MODEL.config.num_kv_heads}


@pytest.fixture
def seen(monkeypatch):
    """The shapes that a kernel of one device's own sees, in the place of the dense one."""
    shapes = set()

    def attend(q, k, v, segment_ids, scoring, sinks, max_segment_len):
        shapes.add((q.shape[0], q.shape[2], k.shape[2], segment_ids.shape[0]))
        return dense_attention(q, k, v, segment_ids, scoring, sinks)

    monkeypatch.setitem(choose.KERNELS, "alone", Kernel(rows=attend, is_whole=False))
    return shapes


def gradients_in(layout, attention: str, remat: bool = False):
    options = TrainOptions(compute=Compute(attention=attention, remat=remat))
    gradients = quick_jit(make_gradients(MODEL, SFT_LOSS, layout, options))
    batch = place_batch(BATCH, train_rules(layout.strategy), layout)
    grads, sums = gradients(place_params(MODEL, random_tree(MODEL), layout), batch)
    return grads, np.asarray(sums.loss.sum)


@pytest.mark.parametrize(
    "strategy",
    [
        {"tp": 2},
        {"dp": 2, "tp": 4, "sp": True},  # two key-value heads on four devices
        {"dp": 4, "zero": 3},
        {"pp": 2, "tp": 2},
        {"dp": 2, "pp": 2, "tp": 2, "zero": 1},
    ],
    ids=str,
)
def test_gradients_are_those_of_one_device(strategy, seen):
    layout = make_layout(**strategy)
    grads, loss = gradients_in(layout, "alone", remat="zero" in strategy)
    expected_grads, expected_loss = gradients_in(make_layout(), "dense")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_close_in_norm(grads, expected_grads, 1e-5)
    parallel = layout.strategy
    num_kv = HEADS["kv"] if HEADS["kv"] % parallel.tp == 0 else HEADS["q"]
    for rows, q_heads, kv_heads, segment_rows in seen:
        assert (q_heads, kv_heads) == (HEADS["q"] // parallel.tp, num_kv // parallel.tp)
        # A pipeline cuts them further, into micro-batches.
        assert rows == segment_rows and HEADS["rows"] // parallel.dp % rows == 0
        assert parallel.pp > 1 or rows == HEADS["rows"] // parallel.dp


def test_a_device_alone_is_not_split(seen):
    gradients_in(make_layout(), "alone")
    assert seen == {(HEADS["rows"], HEADS["q"], HEADS["kv"], HEADS["rows"])}


@pytest.mark.parametrize("strategy", [{}, {"dp": 2, "tp": 2, "zero": 1}, {"pp": 2}], ids=str)
def test_gradients_by_cudnn_as_it_is_documented_are_those_of_the_definition(strategy, monkeypatch):
    """Through a whole model: loops over layers, micro-batches and stages, and layers computed anew."""
    emulate_cudnn()
    monkeypatch.setitem(choose.KERNELS, "cudnn", Kernel(rows=cudnn_attention, is_whole=False))
    grads, loss = gradients_in(make_layout(**strategy), "cudnn", remat=True)
    expected_grads, expected_loss = gradients_in(make_layout(), "dense")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_close_in_norm(grads, expected_grads, 1e-5)
