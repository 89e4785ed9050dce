"""One bidirectional mapping between our parameter tree and HuggingFace's tensors.

A rule says where a leaf of ours lies in a checkpoint and how its dims are ordered there. It is read forwards to save,
backwards to load, and on slices, so that a process can read no more than its devices hold.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any

import numpy as np

from realjax.models.config import ModelConfig

Shape = tuple[int, ...]
ReadFn = Callable[[str, tuple[slice, ...]], np.ndarray]

HEAD = "head/kernel"
CRITIC_HEAD_NAME = "score.weight"  # transformers' name of the scalar head of *ForSequenceClassification
# Written by old versions of transformers and by ReaL; computed, never learned.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|position_ids)$")


@dataclass(frozen=True)
class Rule:
    """Leaf `path` of ours is tensor `name` of the checkpoint; `dims` orders them, as "(N H) D -> D N H" (HF -> ours).

    With `{layer}` in the name there is one such tensor per index of our leaf's leading dim, which `dims` leaves out.
    """

    path: str
    name: str
    dims: str

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """For each HF dim, the dims of ours (of one layer) that it merges, outermost first."""
        hf, ours = self.dims.split(" -> ")
        place = {letter: dim for dim, letter in enumerate(ours.split())}
        return tuple(tuple(place[x] for x in group.strip("()").split()) for group in re.findall(r"\(.*?\)|\w", hf))

    def hf_shape(self, shape: Shape) -> Shape:
        """Returns the shape of the HF tensor of a leaf (of one layer of it) of `shape`."""
        return tuple(prod(shape[dim] for dim in group) for group in self.groups)

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        """Returns the HF tensor of one layer of ours."""
        order = [dim for group in self.groups for dim in group]
        return x.transpose(order).reshape(self.hf_shape(x.shape))

    def from_hf(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """Returns one layer of ours, of `shape`, from its HF tensor; the inverse of `to_hf`."""
        order = [dim for group in self.groups for dim in group]
        return x.reshape([shape[dim] for dim in order]).transpose(np.argsort(order))

    def read(self, read_fn: ReadFn, name: str, shape: Shape, index: tuple[slice, ...]) -> np.ndarray:
        """Returns `ours[index]` of one layer of `shape`, reading only the rows and columns of `name` that hold it.

        A merged HF dim is read in whole blocks of its outermost dim; the rest is cut after the reshape.
        """
        window, sizes, keep = [], list(shape), [slice(None)] * len(shape)
        for outer, *inner in self.groups:
            block = prod(shape[dim] for dim in inner)
            start, stop, _ = index[outer].indices(shape[outer])
            window.append(slice(start * block, stop * block))
            sizes[outer] = stop - start
            for dim in inner:
                keep[dim] = index[dim]
        return self.from_hf(read_fn(name, tuple(window)), tuple(sizes))[tuple(keep)]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its class names, its table, and its config in both directions."""

    name: str
    published_as: tuple[str, ...]  # names of model series of this architecture
    causal_class: str
    critic_class: str
    rules: tuple[Rule, ...]
    config_from_hf: Callable[[Mapping[str, Any], bool], ModelConfig]  # (config.json, is_critic)
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """One tensor of a checkpoint: all of a leaf, or layer `layer` of it."""

    name: str
    rule: Rule
    layer: int | None
    shape: Shape


def leaf_rules(family: Family, config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Rule]:
    """Returns the rule of every leaf of `shapes`, in the table's order. Raises ValueError for a leaf without a rule."""
    table = {rule.path: rule for rule in family.rules}
    if unknown := [path for path in shapes if path not in table]:
        raise ValueError(
            f"family '{family.name}': no rule for {_listed(unknown)}; the parameters are not those of this family, "
            f"or its table in realjax/hf/families lacks a line"
        )
    if config.is_critic:
        table[HEAD] = replace(table[HEAD], name=CRITIC_HEAD_NAME)
    return {path: rule for path, rule in table.items() if path in shapes}


def hf_tensors(rules: Mapping[str, Rule], shapes: Mapping[str, Shape]) -> Iterator[HFTensor]:
    """Yields every HF tensor of the leaves in file order: embedding, then layer by layer, then the rest."""
    for stacked, run in groupby(rules.values(), key=lambda rule: rule.stacked):
        batch = list(run)
        if not stacked:
            for rule in batch:
                yield HFTensor(name=rule.name, rule=rule, layer=None, shape=rule.hf_shape(shapes[rule.path]))
            continue
        for layer in range(shapes[batch[0].path][0]):
            for rule in batch:
                shape = rule.hf_shape(shapes[rule.path][1:])
                yield HFTensor(name=rule.name.format(layer=layer), rule=rule, layer=layer, shape=shape)


def real_shapes(rules: Mapping[str, Rule], shapes: Mapping[str, Shape], num_layers: int) -> dict[str, Shape]:
    """Returns the shapes of the leaves without empty layers: what a checkpoint holds of them."""
    return {path: (num_layers, *shapes[path][1:]) if rule.stacked else shapes[path] for path, rule in rules.items()}


def check_tensors(
    subject: str, expected: Mapping[str, Shape], found: Mapping[str, Shape], optional: frozenset[str] = frozenset()
) -> None:
    """Raises ValueError, listing names, when tensors are missing, misshapen or left over (but `optional`)."""
    if missing := [name for name in expected if name not in found]:
        raise ValueError(
            f"{subject}: the checkpoint lacks {_listed(missing)}; config.json describes a model that has them. "
            "Use the config.json that belongs to these weights"
        )
    if left := [n for n in found if n not in expected and n not in optional and not BUFFERS.search(n)]:
        raise ValueError(
            f"{subject}: nothing in the model takes {_listed(left)}; config.json describes a model without them. "
            "Use the config.json that belongs to these weights"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{subject}: tensor '{name}' has shape {list(found[name])}, the model needs {list(shape)}; "
                "use the config.json that belongs to these weights"
            )


def _listed(names: list[str], most: int = 6) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return f"{len(names)} tensors: {shown}{', ...' if len(names) > most else ''}" if len(names) > 1 else shown
