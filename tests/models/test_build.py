import jax
import numpy as np
import pytest

from realjax.core.axes import optimizer_rules, train_rules, tree_shardings
from realjax.core.trees import flatten_paths, num_params
from realjax.models.build import build_model, init_params, make_fill
from tests.given.compare import assert_bitwise_equal
from tests.given.models import CAPPED, FULL, cut_empty, make_layout, make_model, with_empty_layers

LAYOUTS = [
    {"dp": 8, "zero": 3},
    {"dp": 2, "tp": 4, "zero": 1, "sp": True},
    {"pp": 4, "tp": 2},
    {"pp": 2, "dp": 2, "tp": 2, "zero": 2},
]


def init(model, layout, seed=7, rules=optimizer_rules, **options):
    shardings = tree_shardings(model.axes, model.abstract, rules(layout.strategy), layout)
    return init_params(model, shardings, seed, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rules", [train_rules, optimizer_rules])
def test_random_parameters_are_the_same_bits_in_every_layout(layout, rules):
    model, layout = make_model(**FULL, num_layers=4), make_layout(**layout)
    params = init(model, layout, rules=rules)
    assert_bitwise_equal(params, init(model, make_layout()))
    shardings = tree_shardings(model.axes, model.abstract, rules(layout.strategy), layout)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings


def test_every_parameter_and_layer_has_values_of_its_own():
    model = make_model(**FULL, hidden_size=64)
    params = flatten_paths(init(model, make_layout()))
    assert {path: leaf.shape for path, leaf in params.items()} == {
        path: leaf.shape for path, leaf in flatten_paths(model.abstract).items()
    }
    drawn = []
    for path, leaf in params.items():
        leaf = np.asarray(leaf)
        if path.endswith(("scale", "bias")):
            assert (leaf == path.endswith("scale")).all(), path
            continue
        share = max(0.05, 3 / leaf.size**0.5)  # by which few numbers may be off
        assert leaf.std() == pytest.approx(0.02, rel=share) and abs(leaf.mean()) < 2 * share * 0.02, path
        drawn += [layer.ravel()[:1000] for layer in leaf] if path.startswith("layers/") else [leaf.ravel()[:1000]]
    for i, one in enumerate(drawn):
        assert not any(np.isin(one, other).sum() > len(one) / 2 for other in drawn[:i])


def test_what_a_norm_learns_begins_without_effect():
    params = flatten_paths(init(make_model(**CAPPED), make_layout()))
    scales = [np.asarray(leaf) for path, leaf in params.items() if path.endswith("scale_less_one")]
    assert len(scales) == 11 and not any(scale.any() for scale in scales)


def test_values_depend_on_the_seed_and_neither_on_depth_nor_on_time():
    model, deeper, layout = make_model(), make_model(num_layers=4), make_layout()
    params = init(model, layout)
    assert_bitwise_equal(params, init(model, layout))
    assert_bitwise_equal(params["layers"], jax.tree.map(lambda x: x[:2], init(deeper, layout)["layers"]))
    other = init(model, layout, seed=8)
    assert not np.isin(params["embed"]["table"], other["embed"]["table"]).any()


def test_empty_layers_are_zeros_that_do_not_count():
    model, layout = make_model(**FULL, num_layers=3), make_layout(pp=2, dp=2, zero=2)
    filled = with_empty_layers(model, 3)
    params = init(filled, layout)
    real, of_empty = cut_empty(filled, params)
    assert_bitwise_equal(real, init(model, make_layout()))
    assert all(len(leaf) == 3 and not leaf.any() for leaf in of_empty)
    assert filled.num_params == model.num_params == num_params(model.abstract)


def test_a_slice_of_a_fill_is_the_slice_of_the_whole():
    fill = make_fill("layers/mlp/up/kernel", (3, 8, 6), seed=1)
    whole = fill((slice(None),) * 3)
    index = (slice(1, 3), slice(2, 5), slice(0, 6, None))
    np.testing.assert_array_equal(fill(index), whole[index])


def test_low_precision_values_are_the_rounded_ones():
    model = make_model()
    low = init(model, make_layout(), dtype=jax.numpy.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), init(model, make_layout()))
    assert_bitwise_equal(low, rounded)


def test_a_model_is_built_once_and_allocates_nothing():
    model = make_model(vocab_size=10**9, hidden_size=8192, num_layers=1000)
    assert model is build_model(model.config)
    assert num_params(model.abstract) > 2 * 10**9 * 8192
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model.abstract))


def test_every_dim_has_a_name():
    model = make_model(**FULL)
    names = flatten_paths(model.axes)
    for path, leaf in flatten_paths(model.abstract).items():
        assert len(names[path]) == leaf.ndim, path
        assert (names[path][0] == "layers") == path.startswith("layers/")
