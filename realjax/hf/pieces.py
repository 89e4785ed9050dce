"""A model's leaves against the tensors of a checkpoint, piece by piece, as the rules of its family say.

Loading and saving go through the same pieces, and loading through slices of them, so that a process can read no more
than its devices hold.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod

import numpy as np

from realjax.hf.dims import Dims, Shape, Window, fit_dims
from realjax.hf.rules import HEAD, LAYERS, Family, Rule
from realjax.models.config import ModelConfig

ReadFn = Callable[[str, Window], np.ndarray]  # reads a slice of the tensor of that name
# For each stack of layers (its path in our tree) the number that each of its layers has in a checkpoint; None: empty.
LayerNumbers = Mapping[str, tuple[int | None, ...]]

CRITIC_HEAD_NAME = "score.weight"  # transformers' name of the scalar head of *ForSequenceClassification
# Written by old versions of transformers and by ReaL; computed, never learned.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|position_ids)$")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a leaf and a tensor have in common, as `dims` says, of the leaf's `index` (layer, expert)."""

    path: str
    index: tuple[int, ...]
    name: str
    dims: Dims


FetchFn = Callable[[Piece], np.ndarray]  # the leaf, or the layer or expert of it, that a piece is of


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """One tensor of a checkpoint and the pieces of our leaves that make it."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]


def number_layers(config: ModelConfig) -> LayerNumbers:
    """Returns the numbers of a model's layers in a checkpoint."""
    if len(config.kinds) == 1:
        return {LAYERS: (*range(config.num_layers), *[None] * config.num_empty_layers)}
    numbers = lambda name: tuple(i for i, kind in enumerate(config.order) if kind == name)
    return {f"{LAYERS}/{name}": numbers(name) for name in config.kinds}


def name_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the sizes of the letters of `models/__init__.py` that a leaf may not have alone in a dim."""
    return {
        "D": config.hidden_size,
        "N": config.num_q_heads,
        "K": config.num_kv_heads,
        "G": config.num_q_heads // config.num_kv_heads,
        "H": config.head_dim,
        "F": config.ffn_size,
        "V": config.vocab_size,
    }


def find_pieces(
    family: Family, config: ModelConfig, shapes: Mapping[str, Shape], names: Mapping[str, str] | None = None
) -> list[Piece]:
    """Returns the pieces of a model's leaves by the rules of its family, see `list_pieces`.

    `names` are those of tensors that a checkpoint calls otherwise than the rules, by the leaf's path.
    """
    names = {**({HEAD: CRITIC_HEAD_NAME} if config.is_critic else {}), **(names or {})}
    rules = [replace(rule, name=names.get(rule.path, rule.name)) for rule in family.rules]
    try:
        return list_pieces(rules, shapes, number_layers(config), name_sizes(config))
    except ValueError as error:
        raise ValueError(f"family '{family.name}': {error}") from error


def list_pieces(
    rules: Sequence[Rule], shapes: Mapping[str, Shape], layer_numbers: LayerNumbers, sizes: Mapping[str, int]
) -> list[Piece]:
    """Returns all pieces of the leaves of these `shapes` in the table's order, but what is of layers layer by layer.

    `sizes` are those of letters that a leaf may not have alone in a dim. Raises ValueError, naming leaves, when they
    have no rule, another shape than it says or another number of layers, or when their rules leave a part of them out.
    """
    fits = {}
    for rule in rules:
        for stack in layer_numbers if rule.stacked else [""]:
            path = stack + rule.path.removeprefix(LAYERS) if rule.stacked else rule.path
            if path in shapes:
                fits[rule, stack] = path, _fit(rule, path, shapes[path], sizes)
    layers = sorted(
        (number, stack, (i,))
        for stack, numbers in layer_numbers.items()
        for i, number in enumerate(numbers)
        if number is not None
    )
    pieces: list[Piece] = []
    for stacked, run in groupby(rules, key=lambda rule: rule.stacked):
        batch = list(run)
        for number, stack, index in layers if stacked else [(None, "", ())]:
            for rule in (rule for rule in batch if (rule, stack) in fits):
                path, dims = fits[rule, stack]
                for expert in range(shapes[path][1]) if rule.per_expert else [None]:
                    name = rule.name.format(layer=number, expert=expert)
                    place = index if expert is None else (*index, expert)
                    pieces.append(Piece(path=path, index=place, name=name, dims=dims))
    _check_leaves(pieces, shapes, layer_numbers)
    return pieces


def _fit(rule: Rule, path: str, shape: Shape, sizes: Mapping[str, int]) -> Dims:
    try:
        return fit_dims(rule.dims_of_one, shape[rule.stacked + rule.per_expert :], sizes)
    except ValueError as error:
        raise ValueError(f"the rule for '{rule.name}' does not fit '{path}': {error}") from error


def _check_leaves(pieces: Iterable[Piece], shapes: Mapping[str, Shape], layer_numbers: LayerNumbers) -> None:
    covered = dict.fromkeys(shapes, 0)
    for piece in pieces:
        covered[piece.path] += piece.dims.num_common
    if unknown := [path for path, count in covered.items() if not count]:
        raise ValueError(
            f"no rule for {_listed(unknown)}; the parameters are not those of this family, or its table in "
            "realjax/hf/families lacks a line"
        )
    for path, shape in shapes.items():
        numbers = next((numbers for stack, numbers in layer_numbers.items() if path.startswith(f"{stack}/")), None)
        if numbers is not None and shape[0] != len(numbers):
            raise ValueError(f"'{path}' has {shape[0]} layers, the model config {len(numbers)}")
        size = prod(shape) if numbers is None else prod(shape[1:]) * sum(number is not None for number in numbers)
        if covered[path] != size:
            raise ValueError(f"the rules cover {covered[path]:,} of the {size:,} numbers of '{path}'")


def list_tensors(pieces: Iterable[Piece]) -> list[HFTensor]:
    """Returns the tensors that the pieces make, in order. Raises ValueError when one lacks a part or has it twice."""
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    for name, parts in by_name.items():
        places = {(part.dims.tensor_shape, tuple(f.start for dim in part.dims.theirs for f in dim)) for part in parts}
        covered, size = sum(part.dims.num_common for part in parts), prod(parts[0].dims.tensor_shape)
        if covered != size or len(places) < len(parts):
            leaves = ", ".join(dict.fromkeys(f"'{part.path}'" for part in parts))
            raise ValueError(
                f"tensor '{name}': its rules cover {covered:,} of its {size:,} numbers from {leaves}; they must cover "
                "each once"
            )
    return [HFTensor(name=n, shape=parts[0].dims.tensor_shape, pieces=tuple(parts)) for n, parts in by_name.items()]


def group_by_leaf(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """Returns the pieces of each leaf."""
    by_leaf: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_leaf[piece.path].append(piece)
    return by_leaf


def read_leaf(pieces: Iterable[Piece], read_fn: ReadFn, index: Window, dtype: np.dtype) -> np.ndarray:
    """Returns that slice of a leaf from its pieces, and 0 in empty layers; reads no more than `Dims.read`."""
    out = np.zeros([s.stop - s.start for s in index], dtype)
    for piece in pieces:
        leading, rest = index[: len(piece.index)], index[len(piece.index) :]
        if all(s.start <= i < s.stop for i, s in zip(piece.index, leading)):
            place = (*(i - s.start for i, s in zip(piece.index, leading)), ...)
            piece.dims.read(partial(read_fn, piece.name), rest, out[place])
    return out


def make_tensor(tensor: HFTensor, fetch_fn: FetchFn, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor in `dtype` from its pieces."""
    out = np.empty(tensor.shape, dtype)
    for piece in tensor.pieces:
        piece.dims.write(fetch_fn(piece), out)
    return out


def check_tensors(
    subject: str, expected: Iterable[HFTensor], found: Mapping[str, Shape], optional: frozenset[str] = frozenset()
) -> None:
    """Raises ValueError, listing names, when tensors are missing, misshapen or left over (but `optional`)."""
    tensors = {tensor.name: tensor for tensor in expected}
    if missing := [name for name in tensors if name not in found]:
        raise ValueError(
            f"{subject}: the checkpoint lacks {_listed(missing)}; config.json describes a model that has them. "
            "Use the config.json that belongs to these weights"
        )
    if left := [n for n in found if n not in tensors and n not in optional and not BUFFERS.search(n)]:
        raise ValueError(
            f"{subject}: nothing in the model takes {_listed(left)}; config.json describes a model without them. "
            "Use the config.json that belongs to these weights"
        )
    for name, tensor in tensors.items():
        if tuple(found[name]) != tensor.shape:
            leaves = " and ".join(dict.fromkeys(f"'{piece.path}'" for piece in tensor.pieces))
            raise ValueError(
                f"{subject}: tensor '{name}' has shape {list(found[name])}, the model needs {list(tensor.shape)} for "
                f"its {leaves}; use the config.json that belongs to these weights"
            )


def _listed(names: list[str], most: int = 6) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return f"{len(names)} tensors: {shown}{', ...' if len(names) > most else ''}" if len(names) > 1 else shown
