"""Which numbers of a checkpoint's tensor are which of a leaf of ours, as a text: "(N H) D -> D N H" (theirs -> ours).

A letter is a dim. `(N H)` is one dim made of two, the outer one first. A sum is one dim in which parts stand one after
another; brackets mark the part that the other side has:

    "(([N] + K + K) H) D -> D N H"         queries, of a tensor of all queries, then all keys, then all values
    "(N ([1] + 1 + 1) H) D -> D N H"       queries, of a tensor in which each head's query, key and value are together
    "(K ([G] + 1 + 1) H) D -> D (K G) H"   the same where G queries share a key and a value
    "F D -> D ([1] + 1) F"                 a tensor that is the first half of a leaf

A letter's size is that of the leaf's dim where it stands alone there, else the model's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from math import prod

import numpy as np

Shape = tuple[int, ...]
Window = tuple[slice, ...]  # for each dim a slice with start and stop
Range = tuple[int, int]

ONE = "1"  # a part that is one number long and no dim of the other side
FACTOR = re.compile(r"\([^()]*\+[^()]*\)|\w+")
DIM = re.compile(r"\((?:[^()]|\([^()]*\))*\)|\w+")


@dataclass(frozen=True)
class Factor:
    """A dim, or one of several that are one dim together. Its `letter` on the other side is `start` to `stop` of it."""

    letter: str
    size: int
    start: int
    stop: int

    @property
    def len(self) -> int:
        return self.stop - self.start


Side = tuple[tuple[Factor, ...], ...]  # for each dim its factors, the outer one first


@dataclass(frozen=True)
class Dims:
    """The dims of a tensor and of a leaf in numbers. What they have in common can be all or a part of either."""

    theirs: Side
    ours: Side

    @cached_property
    def tensor_shape(self) -> Shape:
        return tuple(prod(factor.size for factor in dim) for dim in self.theirs)

    @cached_property
    def num_common(self) -> int:
        """How many numbers of the leaf are in the tensor."""
        return prod(factor.len for factor in chain(*self.theirs))

    def read(self, read_fn: Callable[[Window], np.ndarray], index: Window, out: np.ndarray) -> None:
        """Fills in what the tensor has of `out`, our leaf's `index`; `read_fn` reads a slice of the tensor.

        Reads no more than that, with two exceptions: of `(N H)` whole blocks of the outer dim, and parts that take
        turns number by number.
        """
        for dim in self._turns:
            block, (start, stop) = _block(self.ours[dim]), (index[dim].start, index[dim].stop)
            edges = sorted({start, stop, *range(-(-start // block) * block, stop, block)})
            if len(edges) > 2:
                for a, b in pairwise(edges):
                    within = (*[slice(None)] * dim, slice(a - start, b - start))
                    self.read(read_fn, (*index[:dim], slice(a, b), *index[dim + 1 :]), out[within])
                return
        wanted, place, cut = {ONE: (0, 1)}, [], []
        for s, dim in zip(index, self.ours):
            block, (outer, *inner) = _block(dim), dim
            start, stop = max(s.start, outer.start * block), min(s.stop, outer.stop * block)
            if start >= stop:
                return
            first, last = start // block, -(-stop // block)
            wanted |= {factor.letter: (0, factor.size) for factor in inner}
            wanted[outer.letter] = (first - outer.start, last - outer.start)
            place.append(slice(start - s.start, stop - s.start))
            cut.append(slice(start - first * block, stop - first * block))
        x = _read_ranges(read_fn, self.theirs, wanted).transpose(self._orders[0])
        x = x.reshape([prod(last - first for first, last in (wanted[f.letter] for f in dim)) for dim in self.ours])
        out[tuple(place)] = x[tuple(cut)]

    def write(self, leaf: np.ndarray, out: np.ndarray) -> None:
        """Fills in what the leaf has of `out`, the tensor."""
        x = leaf[tuple(slice(dim[0].start * _block(dim), dim[0].stop * _block(dim)) for dim in self.ours)]
        x = x.astype(out.dtype, copy=False)  # before it is transposed: numpy casts fast what lies in order
        x = x.reshape([factor.len for factor in _letters(self.ours)]).transpose(self._orders[1])
        place = out.reshape([factor.size for factor in chain(*self.theirs)])
        place = place[tuple(slice(factor.start, factor.stop) for factor in chain(*self.theirs))]
        place[...] = x.reshape(place.shape)

    @cached_property
    def _orders(self) -> tuple[list[int], list[int]]:
        """How to transpose an array with one dim for each letter from their order to ours, and back."""
        theirs, ours = ([factor.letter for factor in _letters(side)] for side in (self.theirs, self.ours))
        return [theirs.index(letter) for letter in ours], [ours.index(letter) for letter in theirs]

    @cached_property
    def _turns(self) -> list[int]:
        """Those of our dims along which parts take turns in the tensor: each turn is a piece of it of its own."""
        outside: set[str] = set()
        for dim in self.theirs:
            for i, factor in enumerate(dim):
                if factor.len < factor.size and factor.len * _block(dim[i:]) > 1:
                    outside |= {f.letter for f in dim[:i]}
        return [i for i, dim in enumerate(self.ours) if dim[0].letter in outside]


def fit_dims(text: str, leaf_shape: Shape, sizes: Mapping[str, int]) -> Dims:
    """Returns the dims that `text` describes for a leaf of this shape in a model whose letters have these `sizes`.

    Raises ValueError when the leaf's shape is another than the text's, or a letter has no size.
    """
    theirs, ours = parse_dims(text)
    if len(ours) != len(leaf_shape):
        raise ValueError(f"'{text}' gives the leaf {len(ours)} dims, and it has shape {list(leaf_shape)}")
    known = {**sizes, **{dim[0]: size for dim, size in zip(ours, leaf_shape) if len(dim) == 1 and dim[0].isalpha()}}
    try:
        dims = Dims(*(tuple(tuple(_fit_factor(f, known) for f in dim) for dim in side) for side in (theirs, ours)))
    except KeyError as error:
        raise ValueError(f"'{text}': nothing gives the size of {error}; known: {', '.join(known)}") from error
    shape = tuple(prod(factor.size for factor in dim) for dim in dims.ours)
    if shape != tuple(leaf_shape):
        raise ValueError(f"'{text}' gives the leaf shape {list(shape)}, and it has {list(leaf_shape)}")
    return dims


@lru_cache(maxsize=1024)
def parse_dims(text: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Returns, for both sides of the arrow and for each dim, its factors as they are written.

    Raises ValueError when it is not of the form that this module describes.
    """
    sides = tuple(tuple(tuple(FACTOR.findall(dim)) for dim in DIM.findall(side)) for side in text.split(" -> "))
    whole = " -> ".join(" ".join(DIM.findall(side)) for side in text.split(" -> "))
    letters = [sorted(x for factor in chain(*side) if (x := _pick(factor)) != ONE) for side in sides]
    if len(sides) != 2 or whole != text or letters[0] != letters[1] or len(set(letters[0])) < len(letters[0]):
        raise ValueError(f"'{text}' does not have the same letters once on both sides of one arrow")
    if inner := [factor for dim in sides[1] for factor in dim[1:] if "+" in factor]:
        raise ValueError(f"'{text}': of a leaf's dim only the outer factor can be a sum, not {inner[0]}")
    return sides


def _pick(factor: str) -> str:
    """Returns the letter of a factor as it is written: its own, or that of the marked part of a sum."""
    return factor if "+" not in factor else factor.partition("[")[2].partition("]")[0]


def _fit_factor(factor: str, sizes: Mapping[str, int]) -> Factor:
    terms = factor.strip("()").split(" + ")
    lens = [int(term) if term.isdigit() else sizes[term] for term in (term.strip("[]") for term in terms)]
    marked = next((i for i, term in enumerate(terms) if term.startswith("[")), 0)
    start = sum(lens[:marked])
    return Factor(letter=_pick(factor), size=sum(lens), start=start, stop=start + lens[marked])


def _block(dim: Sequence[Factor]) -> int:
    """Returns how many numbers of a dim belong to one of its outer factor."""
    return prod(factor.size for factor in dim[1:])


def _letters(side: Side) -> list[Factor]:
    return [factor for factor in chain(*side) if factor.letter != ONE]


def _read_ranges(read_fn: Callable[[Window], np.ndarray], side: Side, wanted: Mapping[str, Range]) -> np.ndarray:
    """Returns these ranges of a tensor's letters, with a dim for each letter; reads one slice of the tensor."""
    window, lens, cut = [], [], []
    for dim in side:
        ranges = [(factor.start + wanted[factor.letter][0], factor.start + wanted[factor.letter][1]) for factor in dim]
        # One number of an outer factor, a range of the next, and all of those inside are one slice.
        depth = next((i for i, (first, last) in enumerate(ranges) if last - first > 1), len(dim) - 1)
        begin = sum(first * _block(dim[i:]) for i, (first, _) in enumerate(ranges[: depth + 1]))
        window.append(slice(begin, begin + (ranges[depth][1] - ranges[depth][0]) * _block(dim[depth:])))
        lens += [last - first for first, last in ranges[: depth + 1]] + [factor.size for factor in dim[depth + 1 :]]
        cut += [slice(None)] * (depth + 1) + [slice(*bounds) for bounds in ranges[depth + 1 :]]
    x = read_fn(tuple(window)).reshape(lens)[tuple(cut)]
    return x.reshape([wanted[factor.letter][1] - wanted[factor.letter][0] for factor in _letters(side)])
