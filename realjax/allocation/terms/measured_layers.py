"""What the profile's whole layers, heads and updates say beside the sums of their parts.

The measured layers of one kind give two factors on what `rates` predicts for them, of attention and of all else. Those
of about the wanted size count most: by the token, large batches are slower than those that fit into caches. Lengths and
splits that were not measured follow the formulas, and one that is off by chance counts less than if it stood alone.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from realjax.allocation.cluster import Cluster
from realjax.allocation.measured import HeadPoint, LayerPoint, LayerUse, Span
from realjax.allocation.terms.collectives import Group, collective_seconds
from realjax.allocation.terms.rates import Layer, LayerSplit, Rates, find_rates
from realjax.allocation.workload import ModelShape

# All-reduces of a layer's hidden states over tensor, see `pass_cost`.
NUM_REDUCES: Mapping[LayerUse, int] = {"forward": 2, "backward": 2, "backward_remat": 3, "decode": 2}


@dataclass(frozen=True)
class Factor:
    """How much longer a layer takes than predicted: attention, all else, and the collectives over tensor."""

    other: float = 1.0
    attention: float = 1.0
    tensor: float = 1.0

    def scale(self, layer: Layer) -> Layer:
        """Returns a predicted layer as long as it takes."""
        return Layer(self.other * layer.products, self.attention * layer.attention, self.other * layer.memory)


class MeasuredLayers:
    """The tables of one cluster and dtype."""

    def __init__(self, cluster: Cluster, dtype: str) -> None:
        self.cluster, self.dtype, self.rates = cluster, dtype, find_rates(cluster, dtype)

    def factor(self, use: LayerUse, model: ModelShape, tp: int, size: float) -> Factor:
        """Returns the factor of the measured layers for so many tokens of a device (decode: rows): of the same tp, else
        of one device; of the same sizes, else of any. It is 1 where no layer of the dtype was measured."""
        of_tp = self._points.get((use, tp))
        by_sizes = of_tp or self._points.get((use, 1))
        if not by_sizes:
            return Factor()
        points = by_sizes.get((model.hidden_size, model.ffn_size)) or list(chain.from_iterable(by_sizes.values()))
        other, attention = fit_two(points, size)
        # What a layer's parts tell each other takes no less in a run than by itself.
        return Factor(other, attention, tensor=max(other, 1.0) if of_tp and tp > 1 else 1.0)

    def head(self, use: LayerUse, model: ModelShape, size: float, tp: int) -> float | None:
        """Returns seconds of all that a program does beside its layers for so many tokens of a device (decode: rows),
        its start left out; None where no head of this vocabulary was measured."""
        points = self._heads.get((use, tp, model.hidden_size, model.vocab_size))
        return predict_line(points, size) if points else None

    def update(self, num_params: float) -> float | None:
        """Returns seconds of an update of so many parameters of a device; None where none was measured."""
        return predict_line(self._updates, num_params) if self._updates else None

    def sync(self, num_params: float, zero_stage: int, group: Group) -> float | None:
        """Returns seconds of gradients' sum over a group, see `SyncPoint`; None where no such group was measured.

        Of another number of devices it is scaled as a ring is. The third stage's is not measured.
        """
        own = self._syncs.get((group.span, zero_stage > 0))
        if own is None or zero_stage == 3:
            return None
        num_devices, points = own
        return group.times_ring(num_devices) * max(predict_line(points, num_params), 0.0)

    def move(self, num_bytes: float, span: Span) -> float:
        """Returns seconds in which a device receives so many bytes of parameters, by moves measured over the span."""
        return max(predict_line(self._moves[span], num_bytes), 0.0)

    @cached_property
    def _points(self) -> Mapping[tuple[LayerUse, int], Mapping[tuple[int, int], Sequence["Point"]]]:
        found: dict = defaultdict(lambda: defaultdict(list))
        for point in self.cluster.measured.layers:
            if point.dtype == self.dtype and point.use in NUM_REDUCES and point.seconds > 0:
                other, attention = self._predict(point)
                entry = Point(_count(point), other, attention, point.seconds)
                found[point.use, point.tp][point.hidden_size, point.ffn_size].append(entry)
        return found

    @cached_property
    def _heads(self) -> Mapping[tuple[LayerUse, int, int, int], Sequence["Point"]]:
        found: dict = defaultdict(list)
        for point in self.cluster.measured.heads:
            if point.dtype == self.dtype and (seconds := self._without_start(point)) > 0:
                size, key = _count(point), (point.use, point.tp, point.hidden_size, point.vocab_size)
                found[key].append(Point(size, size, 1.0, seconds))
        return found

    @cached_property
    def _updates(self) -> Sequence["Point"]:
        return [Point(p.num_params, p.num_params, 1.0, p.seconds) for p in self.cluster.measured.updates]

    @cached_property
    def _syncs(self) -> Mapping[tuple[Span, bool], tuple[int, Sequence["Point"]]]:
        found: dict = {}
        for p in self.cluster.measured.syncs:
            if p.dtype == self.dtype and p.seconds > 0:
                _, points = found.setdefault((p.span, p.zero_stage > 0), (p.num_devices, []))
                points.append(Point(p.num_params, p.num_params, 1.0, p.seconds))
        return found

    @cached_property
    def _moves(self) -> Mapping[Span, Sequence["Point"]]:
        found: dict = defaultdict(list)
        for p in self.cluster.measured.moves:
            found[p.span].append(Point(p.num_bytes, p.num_bytes, 1.0, p.seconds))
        return found

    def _without_start(self, point: HeadPoint) -> float:
        """A decode program runs many rounds; the way back's start fell away with the way there."""
        starts = point.use in ("forward", "nll")
        return max(point.seconds - (self.cluster.dispatch_seconds if starts else 0.0), 0.0)

    def _predict(self, point: LayerPoint) -> tuple[float, float]:
        """Returns what is predicted beside attention, and for attention."""
        sizes = {name: getattr(point, name) for name in ("hidden_size", "num_q_heads", "num_kv_heads", "head_dim")}
        model = ModelShape(num_layers=1, vocab_size=1, ffn_size=point.ffn_size, **sizes)
        tokens = point.rows * (1 if point.use == "decode" else point.tokens)
        size = tokens * model.hidden_size * self.rates.itemsize
        reduce = collective_seconds("all_reduce", size, Group(point.tp, 1), self.cluster)
        layer = predict_layer(self.rates, point, model)
        return layer.products + layer.memory + NUM_REDUCES[point.use] * reduce, layer.attention


class Point(NamedTuple):
    """What was measured, and the two parts that it is to be made of."""

    size: float
    first: float
    second: float
    seconds: float


PULL = 0.1  # of the two factors to each other, against a whole relative error: it decides where one length was measured
NEAR = 0.7  # natural logarithm of how many times as large or small a size is that counts 0.6 times as much


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


def _count(point: HeadPoint | LayerPoint) -> int:
    return point.rows * (1 if point.use == "decode" else point.tokens)


def fit_two(points: Sequence[Point], size: float, pull: float = PULL) -> tuple[float, float]:
    """Returns the two factors, none below 0, by which the parts come nearest to what was measured around a size: least
    squares of relative errors, weighted by a normal curve of log size (Cleveland, 1979), and of `pull` times the
    factors' difference."""
    far = np.array([math.log(point.size / max(size, 1.0)) for point in points])
    far -= far[np.abs(far).argmin()]  # beyond all that was measured, the nearest counts whole
    weights = np.exp(-np.square(far / NEAR) / 4)
    parts = np.array([[point.first / point.seconds, point.second / point.seconds] for point in points])
    matrix = np.vstack([weights[:, None] * parts, [pull, -pull]])
    wanted = np.array([*weights, 0.0])
    factors = np.linalg.lstsq(matrix, wanted)[0]
    if factors.min() < 0:  # the best is then on the border: without the other
        column = int(factors.argmax())
        factors = np.zeros(2)
        factors[column] = matrix[:, column] @ wanted / (matrix[:, column] @ matrix[:, column])
    return float(factors[0]), float(factors[1])


def predict_line(points: Sequence[Point], size: float) -> float:
    """Returns seconds on the line through what was measured around a size; of one size in proportion to it."""
    slope, start = fit_two(points, size, pull=0.0)
    return start + slope * size
