"""Parameters split over data (zero_stage 3, arXiv:1910.02054): whole only while a layer uses them.

Each is gathered once a layer and pass. In training, where each device along `data` runs on its own rows, the gradient
of such a gather sums over the devices, in float32, and splits the sum again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
from jax import Array
from jax.sharding import PartitionSpec

from realjax.core.axes import ROW_AXES, Names, Rules, in_use_rules, left_to_split, make_constrain, resolve
from realjax.core.layout import Layout
from realjax.core.trees import Tree, map_paths
from realjax.engine.manual_axes import gather_over_data, gather_sink, gathers, has_own_rows, swap_over_data
from realjax.models.build import Model
from realjax.models.stacks import BlockFn, Layer, split_kinds


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How parameters that are split over data become whole."""

    model: Model
    layout: Layout
    rules: Rules

    @property
    def in_use(self) -> Rules:
        """The table of parameters that a layer uses."""
        return in_use_rules(self.rules)

    def gather(self, kind: str, layer: Layer) -> Layer:
        """Returns a layer's arrays whole, out of their stack."""
        axes = split_kinds(self.model.config, self.model.axes["layers"])[kind]
        axes = jax.tree.map(lambda names: names[1:], axes, is_leaf=lambda node: isinstance(node, tuple))
        params, sinks = self._gather_both(layer.params, layer.sinks, axes)
        return replace(layer, params=params, sinks=sinks)

    def gather_outer(self, params: Tree, sinks: Tree | None) -> tuple[Tree, Tree | None]:
        """Returns the parameters, and their sinks, with those whole that are of no layer."""
        take = lambda tree: {name: leaf for name, leaf in tree.items() if name != "layers"}
        outer, outer_sinks = self._gather_both(take(params), sinks and take(sinks), take(self.model.axes))
        return params | outer, sinks and sinks | (outer_sinks or {})

    def look_up(self, embed_fn: Callable[..., Array], *ids: Array) -> Array:
        """Returns what tables have: each device looks up its columns for all ids, then they swap columns for rows.

        So what crosses is as large as the rows, not the table, and the columns' gradients are summed where they are.
        """
        if not has_own_rows():
            return embed_fn(*ids)
        x = embed_fn(*(gather_over_data(own, 0, ROW_AXES, PartitionSpec()) for own in ids))
        return swap_over_data(x, 0, 2, self._spec(("rows", "residual_time", "act_embed"), x))

    def _gather_both(self, params: Tree, sinks: Tree | None, axes: Tree) -> tuple[Tree, Tree | None]:
        gathered = map_paths(lambda _, x, names: self._gather(gather_over_data, x, names), params, axes)
        return gathered, sinks and map_paths(lambda _, x, names: self._gather(gather_sink, x, names), sinks, axes)

    def _gather(self, gather_fn: Callable[..., Array], x: Array, names: Names) -> Array:
        if not has_own_rows():
            return make_constrain(self.in_use, self.layout)(x, names)
        split = [(dim, self.rules[name]) for dim, name in enumerate(names) if self.rules[name] != self.in_use[name]]
        for dim, axes in split:
            x = gather_fn(x, dim, axes, self._spec(names, x))
        return x

    def _spec(self, names: Names, x: Array) -> PartitionSpec:
        return resolve(names, x.shape, left_to_split(self.rules), self.layout, "what a layer uses")


def make_shards(model: Model, rules: Rules, layout: Layout) -> Shards | None:
    """Returns how parameters become whole that `rules` split over data; None where they are."""
    is_whole = layout.strategy.dp == 1 or rules == in_use_rules(rules)
    return None if is_whole else Shards(model=model, layout=layout, rules=rules)


def keep_shards(block_fn: BlockFn) -> BlockFn:
    """Returns the block that keeps all for its backward pass but the whole parameters, which it gathers again."""
    return jax.checkpoint(block_fn, policy=lambda primitive, *_, **__: not gathers(primitive))
