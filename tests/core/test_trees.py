import jax
import numpy as np
import pytest

from realjax.core.trees import flatten_paths, map_paths, num_bytes, num_params, unflatten_paths
from tests.given.models import FULL, make_model, random_tree

TREE = random_tree(make_model(**FULL))


def test_unflatten_is_the_inverse_of_flatten_whatever_the_order():
    flat = flatten_paths(TREE)
    backwards = dict(reversed(flat.items()))
    for tree in (unflatten_paths(flat), unflatten_paths(backwards)):
        assert jax.tree.structure(tree) == jax.tree.structure(TREE)
        assert all(a is b for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(TREE), strict=True))


def test_paths_are_in_the_order_of_leaves():
    assert all(a is b for a, b in zip(flatten_paths(TREE).values(), jax.tree.leaves(TREE), strict=True))
    assert flatten_paths({"b": {"y": 1, "x": 2}, "a": 3}) == {"a": 3, "b/x": 2, "b/y": 1}
    assert list(flatten_paths({"b": {"y": 1, "x": 2}, "a": 3})) == ["a", "b/x", "b/y"]


def test_map_paths_joins_leaves_by_path():
    doubled = jax.tree.map(lambda x: 2 * x, TREE)
    seen = map_paths(lambda path, one, two: (path, np.array_equal(two, 2 * one)), TREE, doubled)
    assert flatten_paths(seen) == {path: (path, True) for path in flatten_paths(TREE)}
    with pytest.raises(KeyError):
        map_paths(lambda path, *leaves: path, {"a": 1}, {"b": 1})


def test_sizes_are_those_of_one_full_copy():
    tree = {"a": np.zeros((2, 3), np.float32), "b": {"c": jax.ShapeDtypeStruct((5,), np.int8)}}
    assert (num_params(tree), num_bytes(tree)) == (11, 29)
