"""How a model's layers run one after another: those of a kind are a stack of parameters, kinds take turns.

A block gives its rows back and an `Aux`: what it adds to the loss or reports, by name, each a float32 sum over the real
tokens of the rows. The engine divides a scalar by the tokens and by the layers that have it, and adds it to the loss by
its coefficient; counts `[L, E]` of a layer's experts are reported as how uneven they are, see `core.metrics.Load`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.trees import Tree
from realjax.models.config import ModelConfig

Aux = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """A layer's arrays, or those of a stack of layers with a leading dim."""

    params: Tree
    sinks: Tree | None = None  # float32 arrays, where gradients of what is trained are summed, see `sums.collect`
    is_real: Array | None = None  # bool; None: no layer is empty
    number: Array | None = None  # int32, among the layers with experts; None: these are not


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerRow:
    """What every block reads of the rows `[R, T]`."""

    rotations: tuple[tuple[Array, Array], ...]  # cos and sin `[R, T, H/2]` of each of `ModelConfig.ropes`
    segment_ids: Array
    routes: Array | None = None  # choices `[R, T, L, k]` of earlier passes, see `core.routes.Routes`


BlockFn = Callable[[Layer, Array, PerRow], tuple[Array, Aux]]  # (layer, x_RTD, per_row) -> (x_RTD, aux)
Blocks = Mapping[str, BlockFn]  # by kind
Stacks = Mapping[str, Layer]  # by kind
TakeFn = Callable[[Any, int], Array]


class RunLayersFn(Protocol):
    """Runs layers of the kinds `order`, each the next one of its kind's stack."""

    def __call__(
        self, blocks: Blocks, order: tuple[str, ...], stacks: Stacks, x: Array, per_row: PerRow
    ) -> tuple[Array, Aux]:
        """Returns the rows `[R, T, D]` after all layers, and the sums of their terms."""
        ...


def scan_layers(
    blocks: Blocks, order: tuple[str, ...], stacks: Stacks, x: Array, per_row: PerRow, *, unroll: bool = False
) -> tuple[Array, Aux]:
    """Runs the blocks one after another; a pattern is compiled once, whatever its repeats, unless `unroll`.

    Unrolled, a layer's weights and what it keeps for the backward pass are not copied out of and into stacks.
    """
    all_terms: Aux = {}
    num_done = Counter[str]()
    for cycle, times in find_cycles(order):
        parts = {name: _take(stacks[name], num_done[name], times, cycle.count(name)) for name in dict.fromkeys(cycle)}
        x, terms = jax.lax.scan(partial(_run_cycle, blocks, cycle, per_row), x, parts, unroll=unroll)
        all_terms = add_terms(all_terms, {name: term.sum(axis=0) for name, term in terms.items()})
        num_done.update(cycle * times)
    return x, all_terms


def find_cycles(order: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Returns `(kinds, times)` that are `order` one after another: a pattern and its repeats, and runs of one kind."""
    period = next(n for n in range(1, len(order) + 1) if all(order[i] == order[i % n] for i in range(len(order))))
    times = len(order) // period
    repeated = [(order[:period], times)] if times > 1 else []
    rest = order[period * times :] if repeated else order
    return repeated + [((name,), len(list(run))) for name, run in groupby(rest)]


def _take(stack: Layer, first: int, times: int, count: int) -> Layer:
    """Returns the layers from `first` on that a cycle runs: `[times, ...]`, or `[times, count, ...]` of several."""

    def take(x: Array) -> Array:
        part = x if len(x) == times * count else x[first : first + times * count]
        return part if count == 1 else part.reshape(times, count, *part.shape[1:])

    return jax.tree.map(take, stack)


def _run_cycle(blocks: Blocks, cycle: tuple[str, ...], per_row: PerRow, x: Array, layers: Stacks) -> tuple[Array, Aux]:
    all_terms: Aux = {}
    for name, number in number_layers(cycle):
        layer = layers[name] if cycle.count(name) == 1 else jax.tree.map(itemgetter(number), layers[name])
        x, terms = blocks[name](layer, x, per_row)
        all_terms = add_terms(all_terms, terms)
    return x, all_terms


def number_layers(order: tuple[str, ...]) -> list[tuple[str, int]]:
    """Returns `(kind, number)` of each layer: the number counts those of its kind."""
    return [(name, order[:i].count(name)) for i, name in enumerate(order)]


def add_terms(terms: Aux, more: Aux) -> Aux:
    """Returns the terms of both, summed where both have one."""
    return terms | {name: terms[name] + term if name in terms else term for name, term in more.items()}


def skip_empty(block_fn: BlockFn) -> BlockFn:
    """Returns the block that is an identity where a layer is empty; its parameters then have no gradient.

    It is computed all the same: the stages of a pipeline run one program, whose collectives all of them take part in.
    """

    def skipping(layer: Layer, x: Array, per_row: PerRow) -> tuple[Array, Aux]:
        y, terms = block_fn(layer, x, per_row)
        if layer.is_real is None:
            return y, terms
        return jnp.where(layer.is_real, y, x), {n: jnp.where(layer.is_real, term, 0) for n, term in terms.items()}

    return skipping


def split_kinds(config: ModelConfig, layers: Tree) -> dict[str, Tree]:
    """Returns what a tree has for `layers` by kind: where a model has one kind, `layers` is that kind's."""
    return dict.fromkeys(config.kinds, layers) if len(config.kinds) == 1 else layers


def join_kinds(by_kind: Mapping[str, Tree]) -> Tree:
    """Returns what a tree has for `layers`; the inverse of `split_kinds`."""
    return next(iter(by_kind.values())) if len(by_kind) == 1 else dict(by_kind)


def list_layers(by_kind: Mapping[str, Tree], order: tuple[str, ...], take_fn: TakeFn) -> list[Tree]:
    """Returns the trees of single layers in their order; `take_fn(leaf, i)` takes the i-th of its kind, of an array or
    a list of arrays.
    """
    is_leaf = lambda x: isinstance(x, list)
    return [
        jax.tree.map(lambda x, i=i: take_fn(x, i), by_kind[name], is_leaf=is_leaf) for name, i in number_layers(order)
    ]
