"""Loss and gradients are the same number in every layout, packing and micro-batching, and PyTorch's number."""

from dataclasses import dataclass, field
from functools import cache

import jax
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import optimizer_rules, train_rules, tree_shardings
from realjax.core.batch import Batch
from realjax.core.compute import Compute
from realjax.core.layout import Layout
from realjax.core.metrics import finalize, summarize
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import Tree, flatten_paths
from realjax.engine.compiled import place_batch
from realjax.engine.optim import Optimizer
from realjax.engine.state import init_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_gradients, make_train_step
from realjax.models.build import Model
from realjax.models.config import LayerKind, MoEConfig
from tests.given.compare import assert_close_in_norm
from tests.given.models import (
    CAPPED,
    FULL,
    LEARNED,
    PORTABLE_KERNELS,
    make_layout,
    make_model,
    place_params,
    quick_jit,
    random_tree,
)
from tests.given.sequences import make_examples, one_per_row, pack_in_order

# 15 sequences, two of which teach nothing (one token has nothing before it; a prompt has no answer).
LENGTHS = [7, 19, 1, 12, 5, 16, 9, 3, 14, 11, 6, 18, 2, 13, 8]
EXAMPLES = make_examples(LENGTHS)
EXAMPLES[2]["loss_mask"][:] = EXAMPLES[9]["loss_mask"][:] = False
SPARSE = LayerKind(
    name="sparse",
    feed_forward=MoEConfig(
        num_experts=6,
        experts_per_token=2,
        expert_size=16,
        router_bias=True,
        bias=True,
        shared_size=24,
        shared_gate=True,
        balance_coef=0.3,
    ),
)
# Two layers, or one of each kind; four in stages of several, and where rounding in bfloat16 is to even out.
MODELS = {
    "full": make_model(**FULL),
    "tied": make_model(tied=True, num_layers=4),
    "experts": make_model(pattern=(LayerKind(name="dense"), SPARSE)),
    "learned": make_model(**LEARNED),
    "capped": make_model(**CAPPED),
    "deep": make_model(**FULL, num_layers=4),
    "deep-experts": make_model(pattern=(LayerKind(name="dense"), SPARSE), num_layers=4),
    "deep-capped": make_model(**CAPPED, num_layers=4),
}
TERM_COEFS = dict.fromkeys(("experts", "deep-experts"), {"router_z_loss": 0.1})
SCANNED = Compute(unroll=False)  # as accelerators run it
BOUNDED = Compute(max_segment_len=max(LENGTHS))


def wide() -> Batch:
    return pack_in_order(EXAMPLES, 32, num_rows=8)[0]


def narrow() -> Batch:
    return pack_in_order(EXAMPLES, 24, order=reversed(range(len(LENGTHS))), num_rows=16)[0]


def long() -> Batch:
    """Rows so long that attention works in blocks, in an order of its own; most rows are empty."""
    return pack_in_order(EXAMPLES, 128, order=np.random.default_rng(1).permutation(len(LENGTHS)), num_rows=8)[0]


@dataclass(frozen=True)
class Case:
    """One way to compute the same thing."""

    name: str
    layout: dict = field(default_factory=dict)
    num_mbs: int = 1
    batch: Batch = field(default_factory=wide)
    compute: Compute = Compute()
    model: str = "full"


# For models that have something of their own: everything but stages, and these.
ALL_AT_ONCE = {"layout": {"dp": 2, "tp": 2, "zero": 3, "sp": True}, "num_mbs": 2, "batch": narrow()}
IN_STAGES = {"layout": {"pp": 2, "dp": 2, "tp": 2, "zero": 1, "sp": True}, "batch": narrow()}
CASES = [
    Case("packed"),
    Case("packed-long-remat", batch=long(), compute=Compute(remat=True)),
    Case("bounded-segments", batch=long(), compute=BOUNDED),
    Case("dp8", {"dp": 8}),
    Case("dp4-zero1-mbs2", {"dp": 4, "zero": 1}, num_mbs=2),
    Case("dp8-zero2-mbs2", {"dp": 8, "zero": 2}, num_mbs=2, batch=narrow()),
    Case("dp8-zero3-remat", {"dp": 8, "zero": 3}, batch=long(), compute=Compute(remat=True)),
    Case("tp2-kv-heads-split", {"tp": 2}, batch=narrow(), compute=Compute(loss_chunk_tokens=48)),
    Case("tp4-kv-heads-repeated", {"tp": 4}, num_mbs=4),
    Case("tp8-sp-scanned", {"tp": 8, "sp": True}, batch=long(), compute=SCANNED),
    Case("dp2-tp2-zero3-sp-mbs2", {"dp": 2, "tp": 2, "zero": 3, "sp": True}, num_mbs=2, batch=narrow()),
    Case("dp2-tp4-zero2-sp-remat", {"dp": 2, "tp": 4, "zero": 2, "sp": True}, compute=Compute(remat=True)),
    Case("dp4-tp2-zero3-scanned", {"dp": 4, "tp": 2, "zero": 3}, num_mbs=2, compute=SCANNED),
    Case("pp2-dp2-tp2-sp", {"pp": 2, "dp": 2, "tp": 2, "sp": True}, batch=narrow(), model="deep"),
    Case("pp2-dp2-tp2-scanned", {"pp": 2, "dp": 2, "tp": 2}, batch=narrow(), compute=SCANNED, model="deep"),
    Case("pp4-dp2-zero3-mbs2", {"pp": 4, "dp": 2, "zero": 3}, num_mbs=2, compute=Compute(remat=True), model="deep"),
    Case("tied-pp2-tp4-bounded", {"pp": 2, "tp": 4}, batch=long(), compute=BOUNDED, model="tied"),
    Case("tied-dp2-tp4-zero3-sp", {"dp": 2, "tp": 4, "zero": 3, "sp": True}, num_mbs=4, model="tied"),
    Case("tied-dp4-tp2-zero1", {"dp": 4, "tp": 2, "zero": 1}, batch=long(), model="tied"),
    Case("experts-packed-remat", batch=long(), compute=Compute(remat=True), model="experts"),
    Case("experts-dp4-tp2-zero1-mbs2", {"dp": 4, "tp": 2, "zero": 1}, num_mbs=2, model="experts"),
    Case("experts-dp2-tp4-zero3-sp", {"dp": 2, "tp": 4, "zero": 3, "sp": True}, batch=narrow(), model="experts"),
    Case("experts-pp2-dp2-tp2-scanned", {"pp": 2, "dp": 2, "tp": 2}, compute=SCANNED, model="deep-experts"),
    Case("learned-dp2-tp2-zero3-sp-mbs2", **ALL_AT_ONCE, model="learned"),
    Case("learned-pp2-dp2-tp2-zero1-sp", **IN_STAGES, model="learned"),
    Case("capped-dp2-tp2-zero3-sp-mbs2", **ALL_AT_ONCE, model="capped"),
    Case("capped-pp2-dp2-tp2-zero1-sp", **IN_STAGES, model="deep-capped"),
] + [Case(f"attention-{name}", batch=long(), compute=Compute(attention=name)) for name in PORTABLE_KERNELS]


def mean_gradients(
    model: Model, params: Tree, batch: Batch, layout: Layout, options: TrainOptions
) -> tuple[Tree, dict[str, float]]:
    """Returns the gradients of the mean loss, and the loss and its metrics."""
    grads, sums = quick_jit(make_gradients(model, SFT_LOSS, layout, options))(
        place_params(model, params, layout), place_batch(batch, train_rules(layout.strategy), layout)
    )
    shardings = flatten_paths(tree_shardings(model.axes, model.abstract, optimizer_rules(layout.strategy), layout))
    for path, grad in flatten_paths(grads).items():
        assert grad.dtype == np.float32 and grad.sharding.is_equivalent_to(shardings[path], grad.ndim), path
    metrics = {"loss": sums.loss.sum / sums.loss.weight, **finalize(sums.metrics)}
    return jax.tree.map(lambda g: np.asarray(g) / float(sums.loss.weight), grads), {
        name: float(value) for name, value in metrics.items()
    }


@cache
def plain(name: str) -> tuple[Tree, dict[str, float]]:
    """One sequence a row, one device, dense attention: nothing is split, packed or recomputed."""
    options = TrainOptions(compute=Compute(attention="dense"), term_coefs=TERM_COEFS.get(name, {}))
    model = MODELS[name]
    return mean_gradients(model, random_tree(model), one_per_row(EXAMPLES)[0], make_layout(), options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_do_not_depend_on_the_layout_the_packing_or_micro_batches(case):
    model = MODELS[case.model]
    options = TrainOptions(compute=case.compute, num_mbs=case.num_mbs, term_coefs=TERM_COEFS.get(case.model, {}))
    layout = make_layout(**case.layout)
    grads, metrics = mean_gradients(model, random_tree(model), case.batch, layout, options)
    expected, expected_metrics = plain(case.model)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    assert_close_in_norm(grads, expected, 1e-5)


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "tp": 4, "zero": 3, "sp": True}, {"pp": 2, "tp": 4}], ids=str)
def test_bf16_is_float32_but_for_rounding(layout):
    options = TrainOptions(compute=Compute(dtype="bfloat16"))
    grads, metrics = mean_gradients(MODELS["tied"], random_tree(MODELS["tied"]), wide(), make_layout(**layout), options)
    expected, expected_metrics = plain("tied")
    assert metrics == pytest.approx(expected_metrics, rel=1e-2)
    assert_close_in_norm(grads, expected, 5e-2)


@pytest.mark.parametrize(
    "layout, num_mbs", [({"dp": 4, "tp": 2, "zero": 1}, 1), ({"dp": 2, "tp": 2, "zero": 3, "sp": True}, 4)]
)
def test_the_whole_update_does_not_depend_on_the_layout_either(layout, num_mbs):
    model, config = MODELS["full"], OptimizerConfig(lr=1e-2, eps=1e-3, gradient_clipping=0.5)
    optimizer = Optimizer(config=config, total_updates=10)

    def two_updates(layout: Layout, options: TrainOptions) -> tuple[Tree, dict[str, float]]:
        shardings = train_state_shardings(model, optimizer, layout)
        state = init_train_state(place_params(model, random_tree(model), layout), optimizer, shardings)
        step = make_train_step(model, SFT_LOSS, optimizer, layout, options)
        step = quick_jit(step, out_shardings=(shardings, layout.replicated))
        batch = place_batch(wide(), train_rules(layout.strategy), layout)
        for _ in range(2):
            state, metrics = step(state, batch)
        assert int(state.num_updates) == 2
        return state.params, summarize([metrics])

    params, metrics = two_updates(make_layout(**layout), TrainOptions(num_mbs=num_mbs))
    expected, expected_metrics = two_updates(make_layout(), TrainOptions())
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    assert_close_in_norm(params, expected, 1e-5)
