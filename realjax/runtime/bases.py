"""What roles with adapters have in common: the parameters that no role trains, once in each layout that needs them."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

from realjax.core.layout import Layout
from realjax.core.trees import Tree, flatten_paths, join_trees, map_paths, unflatten_paths
from realjax.models.lora import is_adapter, merge_stack
from realjax.reshard.apply import reshard
from realjax.runtime.roles import Role, load_base

logger = logging.getLogger("realjax.bases")
LeafFn = Callable[[str, Array], Any]
# A leaf of a base: its checkpoint, path and length of stack, where it lies, and its type.
Key = tuple[str, str, tuple[int, ...], Sharding, np.dtype]


@partial(jax.jit, static_argnums=(3, 4))
def _merge(kernel: Array, a: Array, b: Array, scale: float, place: Sharding) -> Array:
    return jax.lax.with_sharding_constraint(merge_stack(kernel, a, b, scale), place)


class Bases:
    """The frozen parameters of roles with adapters, in the compute dtype. Roles of one base have one copy together.

    A copy in another layout is made when a call first needs it, and stays: only adapters move from then on.
    """

    def __init__(self, roles: Mapping[str, Role]) -> None:
        """Reads the bases onto the homes of the roles. Every process must make it; ValueError as for `load_role`."""
        self._leaves: dict[Key, Array] = {}
        self._made: dict[str, Tree] = {}  # by call, in the form that its programs take them
        self._roles = roles
        based = [role for role in roles.values() if role.spec.base is not None]
        # Who has more of it first: a critic's is without the vocabulary's head.
        for role in sorted(based, key=lambda role: -len(flatten_paths(role.frozen))):
            self._hold(role, role.home)

    @property
    def trees(self) -> object:
        """All arrays held."""
        return list(self._leaves.values()), self._made

    def at_home(self, role: Role) -> Tree:
        """Returns a role's frozen parameters on its home; nothing for a role whose parameters are all its own."""
        return {} if role.spec.base is None else self._hold(role, role.home)[0]

    def bring(self, role: Role, own: Tree, layout: Layout) -> tuple[Tree, int]:
        """Returns all of a role's parameters in a layout, and the bytes that had to move for it.

        `own` are those that are not the base's, at home.
        """
        base, num_bytes = self._hold(role, layout)
        if layout == role.home:
            return join_trees(base, own), num_bytes
        moved, more = self._move_own(role, own, layout, role.compute.array_dtype)
        return join_trees(base, moved), num_bytes + more

    def prepare(self, role: Role, own: Tree, layout: Layout, call: str, leaf_fn: LeafFn) -> tuple[Tree, int]:
        """Returns what `leaf_fn(path, array)` makes of a role's parameters in a layout, and the bytes that moved.

        Where adapters are applied in a layout that is not home, what it makes of the base is kept for the next call.
        """
        if layout == role.home:
            base, num_bytes = self._hold(role, layout)
            return map_paths(leaf_fn, join_trees(base, own)), num_bytes
        num_bytes = 0
        if call not in self._made:
            self._made[call], num_bytes = self._move_base(role, layout, leaf_fn)
        moved, more = self._move_own(role, own, layout, role.compute.array_dtype)
        return join_trees(self._made[call], map_paths(leaf_fn, moved)), num_bytes + more

    def merge(self, role: Role, own: Tree, layout: Layout, leaf_fn: LeafFn) -> tuple[Tree, int]:
        """As `prepare`, of the parameters W + scale * A B of a model without adapters."""
        base, num_bytes = self._hold(role, layout)
        moved, more = self._move_own(role, own, layout, None)
        found, lora = flatten_paths(moved), role.model.config.lora

        def one(path: str, leaf: Array) -> object:
            stem = path.removesuffix("kernel")
            if lora is not None and f"{stem}lora_a" in found:
                leaf = _merge(leaf, found[f"{stem}lora_a"], found[f"{stem}lora_b"], lora.scale, leaf.sharding)
            return leaf_fn(path, leaf)

        rest = {path: leaf for path, leaf in found.items() if not is_adapter(path)}
        return map_paths(one, join_trees(base, unflatten_paths(rest))), num_bytes + more

    def _hold(self, role: Role, layout: Layout) -> tuple[Tree, int]:
        """Returns the base in a layout, and the bytes that moved to have it there."""
        shardings = flatten_paths(role.frozen_shardings(layout))
        wanted = {path: self._key(role, path, place) for path, place in shardings.items()}
        num_bytes = 0
        if missing := {path: key for path, key in wanted.items() if key not in self._leaves}:
            found = {path: self._find(key) for path, key in missing.items()}
            sources = {path: leaf for path, leaf in found.items() if leaf is not None}
            if len(sources) < len(missing):
                logger.info("%s: its base is read from '%s'", role.spec.name, role.spec.path)
                made = flatten_paths(load_base(role, unflatten_paths({path: shardings[path] for path in missing})))
            else:
                made, report = reshard(sources, {path: shardings[path] for path in missing})
                num_bytes = report.bytes_moved
            self._leaves |= {missing[path]: leaf for path, leaf in made.items()}
        return unflatten_paths({path: self._leaves[key] for path, key in wanted.items()}), num_bytes

    def _key(self, role: Role, path: str, place: Sharding) -> Key:
        assert role.spec.base is not None, f"{role.spec.name} has a base"
        shape = flatten_paths(role.model.abstract)[path].shape
        return role.spec.base, path, shape, place, role.model.copy_dtype(path, role.compute.array_dtype)

    def _find(self, key: Key) -> Array | None:
        """Returns a leaf of the same values in any layout."""
        same = lambda other: (*other[:3], other[4]) == (*key[:3], key[4])
        return next((leaf for other, leaf in self._leaves.items() if same(other)), None)

    def _move_own(self, role: Role, own: Tree, layout: Layout, dtype: np.dtype | None) -> tuple[Tree, int]:
        if not own:
            return {}, 0
        dtypes = None if dtype is None else role.take_own(role.model.copy_dtypes(dtype))
        moved, report = reshard(own, role.take_own(role.shardings(layout)), dtype=dtypes)
        return moved, report.bytes_moved

    def _move_base(self, role: Role, layout: Layout, leaf_fn: LeafFn) -> tuple[Tree, int]:
        home, _ = self._hold(role, role.home)
        made, report = reshard(home, role.frozen_shardings(layout), arrived_fn=leaf_fn)
        return made, report.bytes_moved
