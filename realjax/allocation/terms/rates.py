"""Seconds of what one device does: matrix products, passes over memory, and a layer of a decoder."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from realjax.allocation.cluster import Cluster
from realjax.allocation.measured import ProductPoint
from realjax.allocation.terms.split import ITEM_BYTES
from realjax.allocation.workload import ModelShape

BYTES = {**ITEM_BYTES, "float8_e4m3fn": 1}  # products in 8 bits are published, and not run here
LEAST_BLOCK = 64  # queries that look back together, at least
BACKWARD_OF_ATTENTION = 2.5  # times forward: five products, two of them again or anew (arXiv:2307.08691)


@dataclass(frozen=True)
class Layer:
    """Seconds of one layer on a device's tokens, by what takes them."""

    products: float
    attention: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.products + self.attention + self.memory

    def __add__(self, other: "Layer") -> "Layer":
        return Layer(self.products + other.products, self.attention + other.attention, self.memory + other.memory)

    def at_least(self, seconds: float) -> "Layer":
        """Returns a layer that takes no less than starting its kernels one by one."""
        return Layer(self.products, self.attention, self.memory + max(0.0, seconds - self.seconds))


@dataclass(frozen=True)
class LayerSplit:
    """How a layer is split over devices: its matrices by `tp`, its experts by `ep`; `sp` splits the norms too."""

    tp: int = 1
    sp: bool = False
    ep: int = 1


class Rates:
    """The rates of one device of a cluster in a dtype. Raises ValueError for a dtype without a rate."""

    def __init__(self, cluster: Cluster, dtype: str) -> None:
        if dtype not in cluster.matmul_flops:
            raise ValueError(
                f"cluster {cluster.name}: no rate for {dtype}, only for {', '.join(cluster.matmul_flops)}; add it to "
                "matmul_flops, or measure it with `realjax profile`"
            )
        self.cluster, self.dtype = cluster, dtype
        # Activations and caches of a model whose products are in 8 bits stay in 16.
        self.weight_bytes, self.itemsize = BYTES[dtype], max(2, BYTES[dtype])
        self.flops = cluster.matmul_flops[dtype] * cluster.factor(f"products_{dtype}", cluster.factor("products"))
        self.bandwidth = cluster.memory_bandwidth * cluster.factor("memory")
        self.attention_flops = self._attention_flops()
        self.least_layer = cluster.factor("layer_seconds", 0.0)
        self._products: dict[tuple[float, float, float], float] = {}

    def _attention_flops(self) -> float:
        """Attention's products are in 16 bits at least."""
        known = self.cluster.matmul_flops
        dtype = self.dtype if BYTES[self.dtype] > 1 or "bfloat16" not in known else "bfloat16"
        products = self.cluster.factor(f"products_{dtype}", self.cluster.factor("products"))
        return known[dtype] * products * self.cluster.factor("attention")

    def product(self, rows: float, inner: float, columns: float) -> float:
        """Returns seconds of [rows, inner] x [inner, columns]: measured, else by the roofline (Williams et al., 2009)
        of computing and of moving all three matrices once. Near its ridge they hide each other in part: the root of the
        sum of squares, not the longer of the two."""
        key = rows, inner, columns
        if (found := self._products.get(key)) is None:
            tables = self._tables
            found = self._products[key] = _look_up(tables, *key) if tables else self._roofline(*key)
        return found

    def _roofline(self, rows: float, inner: float, columns: float) -> float:
        moved = self.itemsize * rows * (inner + columns) + self.weight_bytes * inner * columns
        return math.hypot(2 * rows * inner * columns / self.flops, moved / self.bandwidth)

    @cached_property
    def _tables(self) -> Mapping[tuple[int, int], list[ProductPoint]]:
        tables = defaultdict(list)
        for point in sorted(self.cluster.measured.products, key=lambda point: point.rows):
            if point.dtype == self.dtype:
                tables[point.inner, point.columns].append(point)
        return tables

    def passes(self, num_bytes: float) -> float:
        """Returns seconds of reading or writing so many bytes of the device's memory."""
        return num_bytes / self.bandwidth

    def forward(self, model: ModelShape, tokens: float, squares: float, split: LayerSplit) -> Layer:
        """Returns a layer's forward pass over `tokens` of a device; `squares` is the sum of its sequences' squared
        lengths. Causal attention multiplies each query with half of the keys: 2 x squares x heads x head size."""
        heads = model.num_q_heads * model.head_dim / split.tp
        attention = 2 * squares * heads / self.attention_flops
        memory = self.passes(tokens * self.itemsize * _values_passed(model, split))
        if scored := self.cluster.factor("score_bytes", 0.0):
            # Attention of several kernels, before arXiv:2205.14135, writes and reads all scores, and masked ones too.
            attention, memory = 2 * attention, memory + self.passes(scored * squares * model.num_q_heads / split.tp)
        return Layer(self.products(model, tokens, split), attention, memory)

    def squares(self, num_rows: float, row_len: float, longest: float, of_sequences: float) -> float:
        """Returns the squared lengths that attention over rows costs: of their sequences, where the kernel leaves out
        all else. cuDNN does, for 16-bit numbers; in float32 each block of queries looks back as far as the longest
        sequence, see `engine/attention/blocked.py`."""
        if self.itemsize == 2:
            return of_sequences
        back = min(longest, row_len)
        block = min(max(LEAST_BLOCK, min(row_len / 8, back / 4)), row_len)
        return num_rows * (2 * row_len * back - back**2 + block * row_len)

    def products(self, model: ModelShape, tokens: float, split: LayerSplit) -> float:
        """Returns seconds of a layer's matrix products, experts' among them (equally loaded)."""
        h, tp = model.hidden_size, split.tp
        q, kv = model.num_q_heads * model.head_dim / tp, model.num_kv_heads * model.head_dim / tp
        kv = max(kv, model.head_dim)  # key-value heads are copied where tp does not divide them
        seconds = self.product(tokens, h, q + 2 * kv) + self.product(tokens, q, h)
        up, ffn = (2 if model.is_gated else 1), model.ffn_size / tp
        if model.num_experts == 1:
            return seconds + self.product(tokens, h, up * ffn) + self.product(tokens, ffn, h)
        if beside := model.beside_size / tp:
            seconds += self.product(tokens, h, up * beside) + self.product(tokens, beside, h)
        used, rows = _share_experts(model, tokens, split.ep)
        return seconds + model.sparse_share * used * (self.product(rows, h, up * ffn) + self.product(rows, ffn, h))

    def backward(self, model: ModelShape, forward: Layer) -> Layer:
        """Returns the way back: two products for each, and twice the passes over memory."""
        return Layer(2 * forward.products, BACKWARD_OF_ATTENTION * forward.attention, 2 * forward.memory)

    def decode(self, model: ModelShape, rows: float, context: float, split: LayerSplit) -> Layer:
        """Returns a layer's step of one token for each of `rows`, which reads `context` cached tokens of each."""
        kv = max(model.num_kv_heads / split.tp, 1) * model.head_dim
        cached = self.passes(2 * rows * model.mean_places(context) * kv * self.cache_bytes)
        memory = self.passes(rows * self.itemsize * _values_passed(model, split))
        return Layer(self.products(model, rows, split), cached, memory)

    @property
    def cache_bytes(self) -> float:
        """Of a cached number."""
        return self.weight_bytes if self.cluster.factor("small_cache", 0.0) else self.itemsize


@lru_cache(maxsize=64)
def find_rates(cluster: Cluster, dtype: str) -> Rates:
    """Returns the rates of a cluster's devices in a dtype."""
    return Rates(cluster, dtype)


def _values_passed(model: ModelShape, split: LayerSplit) -> float:
    """Returns numbers a token that are read or written beside products and attention: two norms and two sums read and
    write the hidden state (8 h), rotations the queries and keys, the activation what it is given and gives."""
    heads = (model.num_q_heads + 2 * model.num_kv_heads) * model.head_dim
    active = model.sparse_share * model.ffn_size * model.experts_per_token + model.beside_size
    ffn = (3 if model.is_gated else 2) * active
    return 8 * model.hidden_size / (split.tp if split.sp else 1) + (2 * heads + ffn) / split.tp


def _share_experts(model: ModelShape, tokens: float, ep: int) -> tuple[float, float]:
    """Returns how many experts of a device are used, and the rows of each.

    Of E experts, those that b tokens x k draws miss are E (1 - 1/E)^(bk), if tokens choose alike.
    """
    draws, num_experts = tokens * ep * model.experts_per_token, model.num_experts
    used = num_experts * (1 - (1 - 1 / num_experts) ** draws)
    return used / ep, draws / used


def _look_up(tables: Mapping[tuple[int, int], list[ProductPoint]], rows: float, inner: float, columns: float) -> float:
    """Returns seconds by the table: of the product with the nearest matrix, on straight lines between numbers of rows;
    fewer rows than measured take as long as the fewest, more go by the rate of the most."""
    far = lambda key: abs(math.log(key[0] / inner)) + abs(math.log(key[1] / columns))
    nearest = min(tables, key=far)
    points, scale = tables[nearest], inner * columns / (nearest[0] * nearest[1])
    if rows <= points[0].rows:
        return scale * points[0].seconds
    for low, high in zip(points, points[1:]):
        if rows <= high.rows:
            return scale * (low.seconds + (rows - low.rows) / (high.rows - low.rows) * (high.seconds - low.seconds))
    return scale * points[-1].seconds * rows / points[-1].rows
