"""A model says bit for bit the same after its parameters went elsewhere and came back; misuse is a clear error."""

from functools import cache

import jax
import numpy as np
import pytest

from realjax.core.axes import inference_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.trees import Tree
from realjax.engine.compiled import place_batch
from realjax.engine.inference import make_inference
from realjax.models.build import Model
from realjax.reshard.apply import on_host, reshard
from tests.given.compare import assert_bitwise_equal
from tests.given.models import FULL, fill_up, make_model, quick_jit, random_tree, with_empty_layers
from tests.given.sequences import make_examples, pack_in_order

MODELS = {"untied": make_model(**FULL), "tied": make_model(tied=True)}
BATCH, _ = pack_in_order(make_examples([9, 12, 5, 14, 7, 3, 16, 8]), 16, num_rows=8)
BATCH = BATCH.select({"tokens", "segment_ids", "positions"})


def lay(
    positions: tuple[int, ...] = tuple(range(8)), *, dp: int = 1, pp: int = 1, tp: int = 1, zero: int = 0
) -> Layout:
    """Returns the layout on the devices at these positions."""
    strategy = ParallelStrategy(dp=dp, pp=pp, tp=tp, zero_stage=zero)
    return Layout.of(strategy, [jax.devices()[i] for i in positions])


HOMES = {"pipe": lay(pp=2, dp=2, tp=2), "zero3": lay(dp=2, tp=4, zero=3), "half": lay((2, 3, 4, 5), dp=2, tp=2)}
AWAY = {
    "data8": lay(dp=8),
    "pipe": lay(pp=2, dp=2, tp=2),
    "tensor4": lay((7, 1, 5, 3), tp=4),
    "zero3": lay((6, 4, 2, 0), dp=2, pp=2, zero=3),
    "single": lay((6,)),
}


def shardings(model: Model, layout: Layout) -> Tree:
    return tree_shardings(model.axes, model.abstract, inference_rules(layout.strategy), layout)


@cache
def compiled(model_name: str, home: str):
    """Returns `fn(params) -> host log-probabilities` in the home layout: the logits of every token, normalised."""
    model, layout = MODELS[model_name], HOMES[home]
    fn = quick_jit(make_inference(model, "logprobs", layout, Compute()))
    inputs = place_batch(BATCH, inference_rules(layout.strategy), layout)
    return lambda params: np.asarray(fn(params, inputs)["logprobs"])


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("model_name", MODELS)
def test_log_probabilities_are_the_same_bits_after_any_journey(model_name, home):
    model, infer = MODELS[model_name], compiled(model_name, home)
    at_home = shardings(model, HOMES[home])
    params = jax.device_put(random_tree(model), at_home)
    before = infer(params)
    assert np.isfinite(before).all() and len(np.unique(before)) > 40
    for away in AWAY.values():
        for destination in (shardings(model, away), on_host(shardings(model, away))):
            moved, _ = reshard(params, destination)
            params, _ = reshard(moved, at_home, free_source=True)
            assert infer(params).tobytes() == before.tobytes(), f"after {away}"


def test_a_moved_model_says_what_one_loaded_there_says():
    model = MODELS["untied"]
    params = random_tree(model)
    for home in HOMES:
        there = shardings(model, HOMES[home])
        infer = compiled("untied", home)
        for away in ("data8", "single"):
            moved, _ = reshard(jax.device_put(params, shardings(model, AWAY[away])), there)
            assert infer(moved).tobytes() == infer(jax.device_put(params, there)).tobytes()


def test_empty_layers_travel_along():
    model, layout = make_model(num_layers=3, **FULL), HOMES["pipe"]
    filled = with_empty_layers(model, 1)
    params = jax.device_put(fill_up(random_tree(model), 1), shardings(filled, layout))
    before = jax.tree.map(np.asarray, params)
    for away in AWAY.values():
        for destination in (shardings(filled, away), on_host(shardings(filled, away))):
            moved, _ = reshard(params, destination)
            assert_bitwise_equal(moved, before)
            params, _ = reshard(moved, shardings(filled, layout), free_source=True)
    assert_bitwise_equal(params, before)


def test_another_models_layout_is_refused():
    params = jax.device_put(random_tree(MODELS["tied"]), shardings(MODELS["tied"], HOMES["half"]))
    with pytest.raises(ValueError, match=r"reshard: destination_shardings has \d+ leaves, .*not in the tree: .*head"):
        reshard(params, shardings(MODELS["untied"], AWAY["single"]))


def test_a_freed_model_is_refused():
    model = MODELS["tied"]
    params = jax.device_put(random_tree(model), shardings(model, HOMES["half"]))
    reshard(params, shardings(model, AWAY["data8"]), free_source=True)
    with pytest.raises(ValueError, match=r"reshard '\S+': the array is freed .*; move it from the tree that replaced"):
        reshard(params, shardings(model, AWAY["single"]))


def test_devices_that_do_not_exist_make_no_layout():
    with pytest.raises(ValueError, match=r"^layout d4p1m4: needs dp\*pp\*tp = 16 devices, got 8; change the parallel"):
        Layout.of(ParallelStrategy(dp=4, tp=4))
    with pytest.raises(ValueError, match=r"^layout d2p1m1: a device is listed twice in \[3, 3\]"):
        lay((3, 3), dp=2)
