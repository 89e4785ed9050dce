"""Logical axis names to mesh axes: three rule tables and one strict resolver.

Every dim of a parameter, of a batch's arrays and of an important activation has a name. A table gives each name its
mesh axes, or None where the dim is not split. Nothing is split, or left whole, without standing here.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from realjax.core.layout import MESH_AXES, Layout, ParallelStrategy
from realjax.core.trees import Tree, map_paths

Names = tuple[str, ...]


Axes = str | tuple[str, ...] | None

# The mesh axes that rows are split over.
ROW_AXES = ("data", "expert")


@dataclass(frozen=True)
class IfDivides:
    """Split over `axes` when the dim divides by them, else as `otherwise` says (whole on every device by default)."""

    axes: Axes
    otherwise: Axes = None


Rules = Mapping[str, Axes | IfDivides]


def train_rules(strategy: ParallelStrategy) -> Rules:
    """Returns the table for parameters and activations of a training step."""
    return {
        # parameters
        "layers": "pipe",
        "vocab": IfDivides(("tensor", "pipe"), otherwise="tensor"),
        "embed": ROW_AXES if strategy.zero_stage == 3 else None,
        "positions": None,
        "experts": "expert",
        "expert_embed": "data" if strategy.zero_stage == 3 else None,  # the width of an expert's parameters
        "q_heads": "tensor",
        "kv_heads": IfDivides("tensor"),  # fewer than tp: whole on every device
        "head_dim": None,
        "ffn": "tensor",
        "router": None,
        "rank": None,  # of adapters
        "norm": None,
        "score": None,
        # batches and activations
        "rows": ROW_AXES,
        "time": None,
        "segments": None,
        "pairs": None,
        "targets": None,
        "kept": None,
        "choices": None,
        "routes": None,
        "terms": None,
        "texts": None,
        "residual_time": "tensor" if strategy.sequence_parallel else None,
        "act_embed": None,
        "act_vocab": IfDivides(("tensor", "pipe"), otherwise="tensor"),
        "act_ffn": "tensor",
    }


def optimizer_rules(strategy: ParallelStrategy) -> Rules:
    """Returns the training table with the optimizer state (and fp32 masters' updates) split over data from stage
    1 on.
    """
    if strategy.zero_stage == 0:
        return train_rules(strategy)
    return {**train_rules(strategy), "embed": ROW_AXES, "expert_embed": "data"}


def in_use_rules(rules: Rules) -> Rules:
    """Returns the table of parameters while a layer uses them: whole along data, as stage 3 does not keep them."""
    return {**rules, "embed": None, "expert_embed": None}


def inference_rules(strategy: ParallelStrategy) -> Rules:
    """Returns the table of a forward pass without gradients."""
    return train_rules(strategy)


def generate_rules(strategy: ParallelStrategy) -> Rules:
    """Returns the table of prefill and decode. One token a row leaves no sequence to split."""
    return {**train_rules(strategy), "residual_time": None}


def resolve(names: Names, shape: tuple[int, ...], rules: Rules, layout: Layout, subject: str) -> PartitionSpec:
    """Returns the PartitionSpec of an array `subject` whose dims have the logical `names`.

    Raises ValueError for an unknown name, a mesh axis used twice, a rank that differs, or a dim that does not divide.
    """
    if len(names) != len(shape):
        raise ValueError(f"{subject}: {len(names)} axis names {names} for shape {shape}; name every dim")
    spec: list[Axes] = []
    for dim, (name, size) in enumerate(zip(names, shape)):
        if name not in rules:
            known = ", ".join(sorted(rules))
            raise ValueError(f"{subject}: dim {dim} has the unknown axis name '{name}'; known: {known}")
        axes = _choose(rules[name], size, layout)
        if repeated := set(as_tuple(axes)) & {axis for earlier in spec for axis in as_tuple(earlier)}:
            raise ValueError(
                f"{subject}: mesh axis '{repeated.pop()}' is used for two dims of {names}; change the rule of '{name}'"
            )
        if size % (num_shards := _num_shards(axes, layout)) != 0:
            raise ValueError(
                f"{subject}: dim {dim} ('{name}') of size {size} does not divide over mesh axis "
                f"{_in_words(axes, layout)} of size {num_shards}; {_remedy(as_tuple(axes)[0], name, size)}"
            )
        spec.append(axes)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def resolve_sharding(
    names: Names, shape: tuple[int, ...], rules: Rules, layout: Layout, subject: str, memory_kind: str | None = None
) -> NamedSharding:
    """Returns the sharding in `layout` of an array `subject`; ValueError as for `resolve`."""
    return NamedSharding(layout.mesh, resolve(names, shape, rules, layout, subject), memory_kind=memory_kind)


def _choose(rule: Axes | IfDivides, size: int, layout: Layout) -> Axes:
    """Returns the axes over which a rule splits a dim of this size."""
    if not isinstance(rule, IfDivides):
        return rule
    return rule.axes if size % _num_shards(rule.axes, layout) == 0 else rule.otherwise


def as_tuple(axes: Axes) -> tuple[str, ...]:
    """Returns mesh axes as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def keep_axes(axes: Axes, kept: Container[str]) -> Axes:
    """Returns those of the mesh axes that are among `kept`."""
    rest = tuple(axis for axis in as_tuple(axes) if axis in kept)
    return rest if len(rest) > 1 else rest[0] if rest else None


def _num_shards(axes: Axes, layout: Layout) -> int:
    return math.prod(layout.mesh.shape[axis] for axis in as_tuple(axes))


def _in_words(axes: Axes, layout: Layout) -> str:
    return " x ".join(f"'{axis}'" for axis in as_tuple(axes) if layout.mesh.shape[axis] > 1)


_SIZES = {
    "tensor": "a model_parallel_size",
    "pipe": "a pipeline_parallel_size",
    "data": "a data_parallel_size",
    "expert": "an expert_parallel_size",
}


def _remedy(axis: str, name: str, size: int) -> str:
    divisors = [n for n in range(1, min(size, 512) + 1) if size % n == 0]
    stage = " or zero_stage=0" if name in ("embed", "expert_embed") else ""
    return f"use {_SIZES[axis]} among {divisors}{stage}"


def tree_shardings(axes: Tree, abstract: Tree, rules: Rules, layout: Layout, memory_kind: str | None = None) -> Tree:
    """Returns the tree of NamedShardings of parameters (or of anything of their shapes) in `layout`."""

    def one(path: str, leaf, names: Names) -> NamedSharding:
        return resolve_sharding(names, leaf.shape, rules, layout, path, memory_kind)

    return map_paths(one, abstract, axes)


def size_per_device(name: str, size: int, rules: Rules, layout: Layout) -> int:
    """Returns how much each device has of a dim of that name and size, as the code around sees it."""
    return size // _num_shards(_choose(left_to_split(rules)[name], size, layout), layout)


def rows_per_device(num_rows: int, layout: Layout) -> int:
    """Returns how many of the rows that the code around sees are on each device."""
    return size_per_device("rows", num_rows, train_rules(layout.strategy), layout)


def left_to_split(rules: Rules) -> Rules:
    """Returns the table without the mesh axes that a `shard_map` around has taken: its code sees a part already."""
    left = set(MESH_AXES) - set(jax.sharding.get_abstract_mesh().manual_axes)

    def one(rule: Axes | IfDivides) -> Axes | IfDivides:
        if isinstance(rule, IfDivides):
            return IfDivides(keep_axes(rule.axes, left), keep_axes(rule.otherwise, left))
        return keep_axes(rule, left)

    return {name: one(rule) for name, rule in rules.items()}


@dataclass(frozen=True, eq=False)
class Constrain:
    """`constrain(x, names)` tells XLA how an activation is split; the identity on one device, or without a layout."""

    rules: Rules | None = None
    layout: Layout | None = None

    def __call__(self, x: Array, names: Names) -> Array:
        if self.rules is None or self.layout is None or self.layout.strategy.size == 1:
            return x
        spec = resolve(names, x.shape, left_to_split(self.rules), self.layout, f"activation {names}")
        # Inside a pipeline stage, say, the mesh of the context is this one with its pipe axis taken by the stage.
        inner = jax.sharding.get_abstract_mesh()
        mesh = self.layout.mesh if inner.empty else inner
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def tree(self, tree: Tree, axes: Tree) -> Tree:
        """Tells XLA how the arrays of a tree are split, whose dims have the names `axes`."""
        return map_paths(lambda path, leaf, names: self(leaf, names), tree, axes)


def make_constrain(rules: Rules, layout: Layout) -> Constrain:
    """Returns the constraint of activations by a layout's table."""
    return Constrain(rules, layout)
