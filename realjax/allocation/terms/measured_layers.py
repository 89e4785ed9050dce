"""What the profile's whole layers, heads and updates say beside the sums of their parts.

A layer's measured seconds are used as a factor on what `rates` predicts for the same layer, so that lengths and splits
that were not measured follow the formulas from the nearest that were.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from realjax.allocation.cluster import Cluster
from realjax.allocation.measured import HeadPoint, LayerPoint, LayerUse
from realjax.allocation.terms.collectives import Group, collective_seconds
from realjax.allocation.terms.rates import Layer, LayerSplit, Rates, find_rates
from realjax.allocation.workload import ModelShape

# All-reduces of a layer's hidden states over tensor, see `pass_cost`.
NUM_REDUCES: Mapping[LayerUse, int] = {"forward": 2, "backward": 2, "backward_remat": 3, "decode": 2}


@dataclass(frozen=True)
class At:
    """A size: tokens of a device (decode: rows), and the tokens of a row (decode: in its cache)."""

    size: float
    length: float


@dataclass(frozen=True)
class Factor:
    """How much longer a layer takes than predicted; and whether its collectives over tensor are part of that."""

    layer: float = 1.0
    tensor: float = 1.0


class MeasuredLayers:
    """The tables of one cluster and dtype."""

    def __init__(self, cluster: Cluster, dtype: str) -> None:
        self.cluster, self.dtype, self.rates = cluster, dtype, find_rates(cluster, dtype)

    def factor(self, use: LayerUse, model: ModelShape, at: At, tp: int) -> Factor:
        """Returns the factor of the nearest measured layers: of the same tp, else of one device; of the same sizes,
        else of any. It is 1 where no layer of the dtype was measured."""
        of_tp = self._factors.get((use, tp))
        found = of_tp or self._factors.get((use, 1))
        if not found:
            return Factor()
        curves = found.get((model.hidden_size, model.ffn_size)) or _join(found.values())
        factor = _interpolate(_nearest(curves, at.length), math.log(max(at.size, 1)))
        return Factor(layer=factor, tensor=factor if of_tp and tp > 1 else 1.0)

    def head(self, use: LayerUse, model: ModelShape, at: At, tp: int) -> float | None:
        """Returns seconds of all that a program does beside its layers, its start left out; None where no head of this
        vocabulary was measured."""
        curves = self._heads.get((use, tp, model.hidden_size, model.vocab_size))
        if not curves:
            return None
        points = _nearest(curves, at.length)
        if at.size > points[-1][0]:
            return points[-1][1] * at.size / points[-1][0]
        return _interpolate(points, at.size)

    def update(self, num_params: float) -> float | None:
        """Returns seconds of an update of so many parameters of a device; None where none was measured."""
        points = sorted((point.num_params, point.seconds) for point in self.cluster.measured.updates)
        if not points:
            return None
        if num_params > points[-1][0]:
            return points[-1][1] * num_params / points[-1][0]
        return _interpolate(points, num_params)

    @cached_property
    def _factors(self) -> Mapping[tuple[LayerUse, int], Mapping[tuple[int, int], "Curves"]]:
        found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for point in self.cluster.measured.layers:
            if point.dtype == self.dtype and point.use in NUM_REDUCES and point.seconds > 0:
                size = point.rows * (1 if point.use == "decode" else point.tokens)
                entry = math.log(size), point.seconds / self._predict(point)
                found[point.use, point.tp][point.hidden_size, point.ffn_size][point.tokens].append(entry)
        return found

    @cached_property
    def _heads(self) -> Mapping[tuple[LayerUse, int, int, int], "Curves"]:
        found: dict = defaultdict(lambda: defaultdict(list))
        for point in self.cluster.measured.heads:
            if point.dtype == self.dtype:
                key = point.use, point.tp, point.hidden_size, point.vocab_size
                found[key][point.tokens].append((_count(point), self._without_start(point)))
        return {key: {length: sorted(points) for length, points in curves.items()} for key, curves in found.items()}

    def _without_start(self, point: HeadPoint) -> float:
        """A decode program runs many rounds; the way back's start fell away with the way there."""
        starts = point.use in ("forward", "nll")
        return max(point.seconds - (self.cluster.dispatch_seconds if starts else 0.0), 0.0)

    def _predict(self, point: LayerPoint) -> float:
        sizes = {name: getattr(point, name) for name in ("hidden_size", "num_q_heads", "num_kv_heads", "head_dim")}
        model = ModelShape(num_layers=1, vocab_size=1, ffn_size=point.ffn_size, **sizes)
        tokens = point.rows * (1 if point.use == "decode" else point.tokens)
        size = tokens * model.hidden_size * self.rates.itemsize
        reduce = collective_seconds("all_reduce", size, Group(point.tp, 1), self.cluster)
        return predict_layer(self.rates, point, model).seconds + NUM_REDUCES[point.use] * reduce


Curves = Mapping[int, Sequence[tuple[float, float]]]  # by length: (size, value)


def predict_layer(rates: Rates, point: LayerPoint, model: ModelShape) -> Layer:
    """Returns what is predicted for a measured layer."""
    split = LayerSplit(point.tp)
    if point.use == "decode":
        return rates.decode(model, point.rows, point.tokens, split)
    tokens = point.rows * point.tokens
    squares = rates.squares(point.rows, point.tokens, point.tokens, tokens * point.tokens)
    forward = rates.forward(model, tokens, squares, split)
    if point.use == "forward":
        return forward
    backward = rates.backward(model, forward)
    return backward + forward if point.use == "backward_remat" else backward


@lru_cache(maxsize=64)
def find_measured(cluster: Cluster, dtype: str) -> MeasuredLayers:
    """Returns a cluster's tables of layers in a dtype."""
    return MeasuredLayers(cluster, dtype)


def _count(point: HeadPoint) -> int:
    return point.rows * (1 if point.use == "decode" else point.tokens)


def _join(curves: Iterable[Curves]) -> Curves:
    joined = defaultdict(list)
    for each in curves:
        for length, points in each.items():
            joined[length].extend(points)
    return joined


def _nearest(curves: Curves, length: float) -> list[tuple[float, float]]:
    """Returns the points of the nearest measured length, sorted, those of one size as their mean."""
    nearest = min(curves, key=lambda each: abs(math.log(each / max(length, 1))))
    by_size = defaultdict(list)
    for size, value in curves[nearest]:
        by_size[size].append(value)
    return sorted((size, sum(values) / len(values)) for size, values in by_size.items())


def _interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Returns the value on straight lines between points, and that of the first or last outside."""
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if at <= x1:
            return y0 + (at - x0) / (x1 - x0) * (y1 - y0)
    return points[-1][1]
