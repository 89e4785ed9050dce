"""Low-rank adapters in the engine: what their gradients are, that no layout changes them, and that a base is not
touched.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.axes import train_rules
from realjax.core.compute import Compute
from realjax.core.lora_config import LoRAConfig
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import Tree, flatten_paths, join_trees, map_paths
from realjax.engine.compiled import place_batch
from realjax.engine.optim import Optimizer
from realjax.engine.state import init_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_gradients, make_train_step
from realjax.models.build import Model, build_model, init_params
from realjax.models.lora import merge_stack
from tests.given.compare import assert_bitwise_equal, assert_close_in_norm, device_bytes
from tests.given.models import (
    CAPPED,
    EXPERTS,
    SIZES,
    make_layout,
    make_model,
    on_one_device,
    place_params,
    quick_jit,
    random_tree,
)
from tests.given.sequences import make_examples, pack_in_order

LORA = LoRAConfig(rank=3, alpha=6)
FULL = make_model(lora=LORA, num_kv_heads=4)
CAPPED_MODEL = make_model(lora=replace(LORA, targets=("q", "o", "gate", "down")), **{**CAPPED, "num_layers": 4})
BATCH = pack_in_order(make_examples([9, 30, 17, 3, 22, 8, 14]), 32, num_rows=8)[0]


def gradients_of(model: Model, params: Tree, layout, options: TrainOptions) -> tuple[Tree, float]:
    """Returns the gradients of the summed loss of what is trained, and the loss."""
    trained = place_params(model, params, layout)
    frozen = (
        ()
        if model.config.lora is None
        else (model.take_frozen(place_params(model, params, layout, train_rules(layout.strategy))),)
    )
    batch = place_batch(BATCH, train_rules(layout.strategy), layout)
    fn = quick_jit(make_gradients(model, SFT_LOSS, layout, options))
    grads, sums = fn(model.take_trained(trained), batch, *frozen)
    return jax.tree.map(np.asarray, grads), float(sums.loss.sum)


def merge(model: Model, params: Tree) -> Tree:
    """Returns the dense parameters that compute the same."""
    flat = flatten_paths(params)
    lora = model.config.lora
    assert lora is not None

    def one(path: str, leaf):
        stem = path.removesuffix("kernel")
        if f"{stem}lora_a" not in flat:
            return leaf
        return np.asarray(merge_stack(leaf, flat[f"{stem}lora_a"], flat[f"{stem}lora_b"], lora.scale))

    return map_paths(one, model.take_frozen(params))


def project(model: Model, params: Tree, dense: Tree) -> Tree:
    """Returns the gradients of A and B by the chain rule from those of W + scale A B, number by number in float64."""
    lora, flat, expected = model.config.lora, flatten_paths(params), {}
    assert lora is not None
    for path, grad in flatten_paths(dense).items():
        stem = path.removesuffix("kernel")
        if f"{stem}lora_a" not in flat:
            continue
        a, b = (np.asarray(flat[f"{stem}{name}"], np.float64) for name in ("lora_a", "lora_b"))
        of_a, of_b = np.zeros(a.shape), np.zeros(b.shape)
        for layer in range(len(a)):
            A, B = a[layer].reshape(-1, lora.rank), b[layer].reshape(lora.rank, -1)
            W = np.asarray(grad[layer], np.float64).reshape(len(A), -1)
            for r in range(lora.rank):
                for i in range(len(A)):
                    of_a[layer].reshape(A.shape)[i, r] = lora.scale * sum(W[i, o] * B[r, o] for o in range(B.shape[1]))
                for o in range(B.shape[1]):
                    of_b[layer].reshape(B.shape)[r, o] = lora.scale * sum(A[i, r] * W[i, o] for i in range(len(A)))
        expected |= {f"{stem}lora_a": of_a, f"{stem}lora_b": of_b}
    return expected


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Tree, float]]:
    """The gradients on one device."""
    models = {"full": FULL, "capped": CAPPED_MODEL}
    return {name: gradients_of(m, random_tree(m), make_layout(), TrainOptions()) for name, m in models.items()}


@pytest.mark.parametrize("name, model", [("full", FULL), ("capped", CAPPED_MODEL)])
def test_gradients_are_those_of_the_dense_model_projected_on_a_and_b(name, model, alone):
    params, plain = random_tree(model), build_model(model.config.without_adapters())
    dense, dense_loss = gradients_of(plain, merge(model, params), make_layout(), TrainOptions())
    grads, loss = alone[name]
    assert loss == pytest.approx(dense_loss, rel=1e-5)
    expected = project(model, params, dense)
    assert flatten_paths(grads).keys() == expected.keys()
    assert_close_in_norm(flatten_paths(grads), expected, 2e-5)


LAYOUTS = {
    "dp4-tp2-zero1-mbs2": ("full", {"dp": 4, "tp": 2, "zero": 1}, TrainOptions(num_mbs=2)),
    "dp2-tp4-zero3-sp": ("full", {"dp": 2, "tp": 4, "zero": 3, "sp": True}, TrainOptions()),
    "dp2-zero3-mbs2-remat": ("full", {"dp": 2, "zero": 3}, TrainOptions(num_mbs=2, compute=Compute(remat=True))),
    "pp2-dp2-tp2-sp-zero2": ("full", {"pp": 2, "dp": 2, "tp": 2, "sp": True, "zero": 2}, TrainOptions()),
    "capped-pp2-tp2-remat": ("capped", {"pp": 2, "tp": 2}, TrainOptions(compute=Compute(remat=True))),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(case, alone):
    name, layout, options = LAYOUTS[case]
    model = {"full": FULL, "capped": CAPPED_MODEL}[name]
    grads, loss = gradients_of(model, random_tree(model), make_layout(**layout), options)
    assert loss == pytest.approx(alone[name][1], rel=1e-5)
    assert_close_in_norm(grads, alone[name][0], 2e-5)


def test_a_critics_head_is_trained_beside_its_adapters():
    critic = make_model(lora=LORA, is_critic=True)
    trained = flatten_paths(critic.take_trained(critic.abstract))
    assert "head/kernel" in trained and all(path == "head/kernel" or "/lora_" in path for path in trained)
    assert (
        flatten_paths(critic.abstract).keys()
        == flatten_paths(join_trees(critic.take_frozen(critic.abstract), critic.take_trained(critic.abstract))).keys()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_changes_adapters_alone_and_nothing_else_has_masters_or_moments(dtype):
    layout = make_layout(dp=2, tp=2, zero=1)
    optimizer = Optimizer(config=OptimizerConfig(lr=1e-2, lr_scheduler_type="constant"), total_updates=10)
    shardings = train_state_shardings(FULL, optimizer, layout)
    params = place_params(FULL, random_tree(FULL), layout)
    state = init_train_state(FULL.take_trained(params), optimizer, shardings)
    base = FULL.take_frozen(place_params(FULL, random_tree(FULL), layout, train_rules(layout.strategy)))
    base = jax.tree.map(lambda x: x.astype(dtype), base)
    before, base_before = jax.tree.map(np.asarray, (state.params, base))
    step = make_train_step(FULL, SFT_LOSS, optimizer, layout, TrainOptions(compute=Compute(dtype=dtype)))
    step = quick_jit(step, out_shardings=(shardings, layout.replicated), donate_argnums=0)
    state, _ = step(state, place_batch(BATCH, train_rules(layout.strategy), layout), base)
    assert_bitwise_equal(base, base_before)
    for path, leaf in flatten_paths(state.params).items():
        assert (np.asarray(leaf) != flatten_paths(before)[path]).any(), path
    numbers = sum(leaf.size for leaf in jax.tree.leaves(FULL.take_trained(FULL.abstract)))
    moments = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    held = sum(leaf.size for leaf in moments.values())
    assert 2 * numbers <= held <= 2 * numbers + 4  # and counts of updates
    assert device_bytes(state.params, jax.devices()[0]) <= 4 * numbers


def test_at_first_b_is_zero_and_a_is_uniform_within_the_root_of_its_inputs():
    params = flatten_paths(init_params(FULL, on_one_device(FULL), seed=1))
    for path, leaf in params.items():
        if path.endswith("lora_b"):
            assert not np.asarray(leaf).any()
        if path.endswith("lora_a"):
            bound = np.prod(leaf.shape[1:-1]) ** -0.5
            assert 0.8 * bound < np.abs(np.asarray(leaf)).max() <= bound, path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 0}, "rank 0"),
        ({"targets": ("q", "w")}, "found q w; it needs one or more of q k v o"),
        ({"targets": ()}, "found none"),
    ],
)
def test_adapters_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LORA, **changes)


def test_a_model_refuses_targets_that_it_has_not():
    from realjax.hf.families import config_from_hf

    experts = config_from_hf({"model_type": "qwen3_moe", **SIZES, **EXPERTS}, "experts")
    with pytest.raises(ValueError, match="found down gate up for a model with experts"):
        replace(experts, lora=LORA)
    with pytest.raises(ValueError, match="found gate for a model whose feed-forwards have none"):
        make_model(gated=False, lora=LORA)
