"""The whole measurement: from a machine's devices to the description of its cluster."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax

from realjax.allocation.cluster import Cluster, Link
from realjax.allocation.measured import (
    CollectivePoint,
    HeadPoint,
    LayerPoint,
    Measured,
    MovePoint,
    ProductPoint,
    RoundPoint,
    Span,
    SyncPoint,
    UpdatePoint,
)
from realjax.core.layout import Layout, ParallelStrategy
from realjax.models.config import ModelConfig
from realjax.profiling.clock import Clock
from realjax.profiling.collectives import Group, find_link, list_groups, measure_group
from realjax.profiling.layers import PROGRAMS, Case, Program, measure_layers, measure_update
from realjax.profiling.machine import (
    MIB,
    Busy,
    Product,
    measure_dispatch,
    measure_host_link,
    measure_memory,
    measure_products,
    measure_sharing,
    read_host_bytes,
    read_memory_bytes,
)
from realjax.profiling.syncs import measure_moves, measure_rounds, measure_syncs

logger = logging.getLogger("realjax.profile")
TellFn = Callable[[str, int, int], None]  # fn(what is measured, stages done, stages in all)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured of the machine itself, as fits a kind of device."""

    product_rows: tuple[int, ...]
    squares: tuple[int, ...]  # matrices beside those of the models
    message_bytes: tuple[int, ...]
    memory_bytes: int
    host_bytes: tuple[int, ...]


SIZES = {
    "cpu": Sizes(
        product_rows=(8, 64, 512, 2048),
        squares=(256, 1024),
        message_bytes=(4096, 256 * 1024, 4 * MIB, 32 * MIB),
        memory_bytes=64 * MIB,
        host_bytes=(MIB, 64 * MIB),
    ),
    "other": Sizes(
        product_rows=(16, 256, 4096, 16384),
        squares=(1024, 4096, 8192),
        message_bytes=(64 * 1024, MIB, 16 * MIB, 256 * MIB),
        memory_bytes=1024 * MIB,
        host_bytes=(16 * MIB, 1024 * MIB),
    ),
    "quick": Sizes(
        product_rows=(64,), squares=(256,), message_bytes=(4096, MIB), memory_bytes=8 * MIB, host_bytes=(MIB, 8 * MIB)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to be measured. The models are by their paths; each is run in every size of tp, rows and tokens."""

    name: str
    num_nodes: int
    devices_per_node: int
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    tensor_sizes: tuple[int, ...] = (1,)
    rows: tuple[int, ...] = (2, 8)
    tokens: tuple[int, ...] = (64, 256)
    programs: tuple[Program, ...] = PROGRAMS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # the first is that of the layers
    clock: Clock = Clock()
    quick: bool = False


class Profile:
    """Measures one thing after the other. Every process of the cluster makes one, with the same settings."""

    def __init__(self, settings: Settings, devices: Sequence[jax.Device]) -> None:
        """`devices` are all of the cluster's, node by node."""
        self.settings, self.devices, self.clock = settings, devices, settings.clock
        self.local = [device for device in devices if device.process_index == jax.process_index()]
        self.busy = Busy(self.local)
        platform = self.local[0].platform
        self.sizes = SIZES["quick" if settings.quick else platform if platform in SIZES else "other"]
        self.dispatch_seconds = self.memory_bandwidth = 0.0
        self.to_host: Link | None = None
        self.sharing = dict.fromkeys(settings.tensor_sizes, 1.0)
        self.products: list[ProductPoint] = []
        self.collectives: list[CollectivePoint] = []
        self.layers: list[LayerPoint] = []
        self.heads: list[HeadPoint] = []
        self.updates: list[UpdatePoint] = []
        self.syncs: list[SyncPoint] = []
        self.rounds: list[RoundPoint] = []
        self.moves: list[MovePoint] = []

    def run(self, tell_fn: TellFn) -> Cluster:
        """Returns the cluster as it was measured; `tell_fn` is told before each stage."""
        stages = list(self._stages())
        for number, (what, measure) in enumerate(stages):
            tell_fn(what, number, len(stages))
            measure()
        tell_fn("done", len(stages), len(stages))
        return self._describe()

    def _stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "starting a program, memory", self._measure_machine
        yield "host memory", self._measure_host
        for dtype in self.settings.dtypes:
            yield f"matrix products in {dtype}", partial(self._measure_products, dtype)
        for group in list_groups(self.settings.num_nodes, self.settings.devices_per_node):
            where = group.span.replace("_", " ")
            yield f"collectives of {group.size} devices {where}", partial(self._measure_group, group)
        for path, config in self.settings.models.items():
            if self._shares_cores:
                yield from self._stages_between(path, config)
            for layout in self._layouts(config):
                yield f"updates of {path}, {layout.strategy}", partial(self._measure_update, config, layout)
                for rows in self.settings.rows:
                    for tokens in self.settings.tokens:
                        what = f"layers of {path}, {layout.strategy}, {rows} rows of {tokens} tokens"
                        yield what, partial(self._measure_layers, config, layout, rows, tokens)

    def _stages_between(self, path: str, config: ModelConfig) -> Iterator[tuple[str, Callable[[], None]]]:
        yield f"parameters of {path} between devices", partial(self._measure_moves, config)
        if "train" in self.settings.programs:
            yield f"gradients of {path} over devices", partial(self._measure_syncs, config)
        # What a round tells is the same few bytes of each model.
        if "decode" in self.settings.programs and path == next(iter(self.settings.models)):
            yield f"rounds of {path} over devices", partial(self._measure_rounds, config)

    def _layouts(self, config: ModelConfig) -> Iterator[Layout]:
        for tp in self.settings.tensor_sizes:
            if config.num_q_heads % tp or config.ffn_size % tp:
                logger.info("tp=%d does not divide the heads and the feed-forward of a model, and is left out", tp)
                continue
            # Of tensor parallelism within a process each has its own devices, as fits its share of a step.
            devices = self.local if tp <= len(self.local) else self.devices
            yield Layout.of(ParallelStrategy(tp=tp), devices[:tp])

    def _measure_machine(self) -> None:
        self.dispatch_seconds = measure_dispatch(self.clock, self.busy)
        self.memory_bandwidth = measure_memory(self.clock, self.busy, self.sizes.memory_bytes)
        sizes = [min(tp, len(self.local)) for tp in self.settings.tensor_sizes]
        if self.local[0].platform == "cpu" and len(self.local) > 1:
            product = Product(dtype="float32", rows=512, inner=512, columns=512)
            slower = measure_sharing(self.clock, self.local, sizes, product)
            self.sharing = dict(zip(self.settings.tensor_sizes, slower, strict=True))

    def _measure_host(self) -> None:
        self.to_host = measure_host_link(self.clock, self.local[0], self.sizes.host_bytes)

    def _measure_products(self, dtype: str) -> None:
        matrices = {(n, n) for n in self.sizes.squares}
        rows = self.sizes.product_rows
        if dtype == self.settings.dtypes[0]:
            for config in self.settings.models.values():
                d, f = config.hidden_size, config.ffn_size
                matrices |= {(d, d), (d, f), (f, d), (d, config.vocab_size)}
        else:  # a rate is all that there is to know of a dtype that the models do not compute in
            rows, matrices = rows[len(rows) // 2 :][:1], {max(matrices)}
        products = [Product(dtype=dtype, rows=r, inner=i, columns=c) for r in rows for i, c in sorted(matrices)]
        self.products += measure_products(self.clock, self.busy, products, self.dispatch_seconds)

    def _measure_group(self, group: Group) -> None:
        mesh = group.make_mesh(self.devices, self.settings.devices_per_node)
        self.collectives += measure_group(self.clock, group, mesh, self.sizes.message_bytes)

    @property
    def _shares_cores(self) -> bool:
        """Whether what devices tell each other takes turns with what they compute: on accelerators it does not."""
        return self.local[0].platform == "cpu" and len(self.devices) > 1

    @property
    def _least_case(self) -> Case:
        """A case of one device with few tokens: what is computed is taken off, and with it how that scatters."""
        settings, layout = self.settings, Layout.of(ParallelStrategy(), self.local[:1])
        return Case(layout=layout, dtype=settings.dtypes[0], rows=min(settings.rows), tokens=min(settings.tokens))

    def _measure_syncs(self, config: ModelConfig) -> None:
        groups, sharing = self._find_groups(), self.sharing.get(1, 1.0)
        self.syncs += measure_syncs(self.clock, config, self._least_case, groups, sharing)

    def _measure_rounds(self, config: ModelConfig) -> None:
        groups, sharing = self._find_groups(), self.sharing.get(1, 1.0)
        self.rounds += measure_rounds(self.clock, config, self._least_case, groups, sharing)

    def _measure_moves(self, config: ModelConfig) -> None:
        self.moves += measure_moves(self.clock, config, self.settings.dtypes[0], self._find_groups())

    def _find_groups(self) -> dict[Span, Sequence[jax.Device]]:
        """Returns the devices of this process's node, and those of all nodes."""
        per_node = self.settings.devices_per_node
        start = self.devices.index(self.local[0]) // per_node * per_node
        groups: dict[Span, Sequence[jax.Device]] = {}
        if per_node > 1:
            groups["within_node"] = self.devices[start : start + per_node]
        if self.settings.num_nodes > 1:
            groups["between_nodes"] = self.devices
        return groups

    def _measure_update(self, config: ModelConfig, layout: Layout) -> None:
        self.updates += measure_update(self.clock, config, layout, self.sharing[layout.strategy.tp])

    def _measure_layers(self, config: ModelConfig, layout: Layout, rows: int, tokens: int) -> None:
        case = Case(
            layout=layout, dtype=self.settings.dtypes[0], rows=rows, tokens=tokens, programs=self.settings.programs
        )
        layers, heads = measure_layers(self.clock, config, case, self.sharing[layout.strategy.tp])
        self.layers += layers
        self.heads += heads

    def _describe(self) -> Cluster:
        assert self.to_host is not None, "all stages have been run"
        settings, device = self.settings, self.local[0]
        within = find_link(self.collectives, "within_node") or find_link(self.collectives, "between_nodes")
        between = find_link(self.collectives, "between_nodes") or within
        processes_per_node = max(1, jax.process_count() // settings.num_nodes)
        return Cluster(
            name=settings.name,
            platform=device.platform,
            num_nodes=settings.num_nodes,
            devices_per_node=settings.devices_per_node,
            memory_bytes=read_memory_bytes(self.local, processes_per_node),
            matmul_flops={dtype: self._best_rate(dtype) for dtype in settings.dtypes},
            memory_bandwidth=self.memory_bandwidth,
            # One device alone talks to nobody; a link has to stand there.
            within_node=within or self.to_host,
            between_nodes=between or self.to_host,
            to_host=self.to_host,
            host_memory_bytes=read_host_bytes(),
            dispatch_seconds=self.dispatch_seconds,
            measured=Measured(
                products=tuple(self.products),
                collectives=tuple(self.collectives),
                layers=tuple(self.layers),
                heads=tuple(self.heads),
                updates=tuple(self.updates),
                syncs=tuple(self.syncs),
                rounds=tuple(self.rounds),
                moves=tuple(self.moves),
            ),
            source=f"measured by realjax profile on {len(self.devices)} x {device.device_kind}, "
            f"{jax.process_count()} process(es), {os.cpu_count()} processor cores a machine",
        )

    def _best_rate(self, dtype: str) -> float:
        own = [point for point in self.products if point.dtype == dtype]
        return max(2 * point.rows * point.inner * point.columns / point.seconds for point in own)
