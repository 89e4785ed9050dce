"""Nested dicts of arrays: the only form in which parameters travel."""

from collections.abc import Callable
from typing import Any

import jax

Tree = dict[str, Any]


def flatten_paths(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Returns `{'layers/attn/q/kernel': leaf}` of a nested dict, in sorted order (that of `jax.tree.leaves`)."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, dict):
            flat |= flatten_paths(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten_paths(flat: dict[str, Any]) -> Tree:
    """Returns the nested dict of `{'a/b': leaf}`; the inverse of `flatten_paths`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        node = tree
        *parents, name = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_paths(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Returns the tree of `fn(path, leaf, *leaves_of_rest)`."""
    others = [flatten_paths(other) for other in rest]
    return unflatten_paths(
        {path: fn(path, leaf, *(o[path] for o in others)) for path, leaf in flatten_paths(tree).items()}
    )


def select_paths(keep_fn: Callable[[str], bool], tree: Tree) -> Tree:
    """Returns the part of a tree whose paths are to be kept."""
    return unflatten_paths({path: leaf for path, leaf in flatten_paths(tree).items() if keep_fn(path)})


def join_trees(*trees: Tree) -> Tree:
    """Returns the tree with the leaves of all; of a path that several have, the last one's."""
    return unflatten_paths({path: leaf for tree in trees for path, leaf in flatten_paths(tree).items()})


def num_params(tree: Tree) -> int:
    """Returns the number of scalars in a tree of arrays or abstract arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
    """Returns the bytes of one full copy of a tree of arrays or abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
