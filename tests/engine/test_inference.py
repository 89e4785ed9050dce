import jax
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import inference_rules
from realjax.core.compute import Compute
from realjax.core.metrics import finalize
from realjax.engine.compiled import place_batch
from realjax.engine.inference import make_evaluation, make_inference
from realjax.engine.train import TrainOptions, make_gradients
from tests.given.models import make_layout, make_model, place_params, quick_jit, random_tree
from tests.given.sequences import make_examples, one_per_row, pack_in_order, unpack_array

EXAMPLES = make_examples([9, 30, 17, 3, 22, 8, 14, 1])
LAYOUTS = [{"dp": 4, "tp": 2, "sp": True}, {"dp": 2, "zero": 3}, {"pp": 2, "tp": 2}]


def infer(model, head, layout, batch, params=None, **options):
    rules = inference_rules(layout.strategy)
    params = place_params(model, params or random_tree(model), layout, rules)
    inference = quick_jit(make_inference(model, head, layout, Compute(**options)))
    return inference(params, place_batch(batch, rules, layout))[head]


@pytest.mark.parametrize("head", ["logprobs", "values"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_outputs_of_a_sequence_depend_on_nothing_but_itself(layout, head):
    model = make_model(is_critic=head == "values")
    alone, alone_plan = one_per_row(EXAMPLES)
    expected = unpack_array(infer(model, head, make_layout(), alone), alone_plan)
    packed, plan = pack_in_order(EXAMPLES, 96, order=[5, 1, 7, 0, 6, 2, 4, 3], num_rows=4)
    found = infer(model, head, make_layout(**layout), packed, max_segment_len=30, loss_chunk_tokens=64)
    assert found.dtype == np.float32 and found.shape == packed["tokens"].shape
    assert found.sharding.is_equivalent_to(make_layout(**layout).sharding("data"), 2)
    for one, other in zip(unpack_array(found, plan), expected):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_evaluations_add_up_to_the_training_loss():
    model, layout = make_model(), make_layout(dp=2, tp=2, zero=1)
    params, rules = random_tree(model), inference_rules(layout.strategy)
    evaluate = quick_jit(make_evaluation(model, SFT_LOSS, layout, Compute()))
    batch = pack_in_order(EXAMPLES, 32, num_rows=8)[0]
    on_device = place_params(model, params, layout)
    halves = [evaluate(on_device, place_batch(batch.rows(rows), rules, layout)) for rows in (slice(4), slice(4, 8))]
    total = jax.tree.map(lambda a, b: float(a + b), *halves)
    alone = make_layout()
    whole = quick_jit(make_gradients(model, SFT_LOSS, alone, TrainOptions()))(params, batch)[1]
    assert total.loss.sum / total.loss.weight == pytest.approx(float(whole.loss.sum / whole.loss.weight), rel=1e-5)
    assert finalize(total.metrics) == pytest.approx({k: float(v) for k, v in finalize(whole.metrics).items()}, rel=1e-5)


def test_bf16_logprobs_are_close_and_come_back_in_float32():
    model, layout = make_model(), make_layout(tp=2)
    batch = pack_in_order(EXAMPLES, 32, num_rows=8)[0]
    exact = np.asarray(infer(model, "logprobs", layout, batch))
    low = infer(model, "logprobs", layout, batch, dtype="bfloat16")
    assert low.dtype == np.float32
    assert 0 < np.abs(low - exact).max() < 0.1 * np.abs(exact).max()
