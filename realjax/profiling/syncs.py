"""What devices of a run tell each other of gradients and parameters: in training steps, and from layout to layout.

Collectives by themselves are quicker than those of a run: there they wait for whoever comes last, share a processor's
core with what is computed beside them, and write to memory that is new. So it is steps and moves that are measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from realjax.allocation.measured import MovePoint, RoundPoint, Span, SyncPoint
from realjax.core.axes import inference_rules, train_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.loss import Loss
from realjax.core.optimizer_config import OptimizerConfig
from realjax.core.trees import Tree
from realjax.engine.compiled import place_batch
from realjax.engine.optim import Optimizer
from realjax.engine.slot_arrays import CHUNK_LEN
from realjax.engine.state import init_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from realjax.models.build import Model, build_model, init_params
from realjax.models.config import ModelConfig
from realjax.profiling.clock import Clock, Probe
from realjax.profiling.layers import FEW, MORE, SMALL_VOCAB, Case, cut, make_batch, probe_decode, sum_loss
from realjax.reshard.apply import reshard

ZERO_STAGES = (0, 2)  # stage 1 sends what stage 2 does, and in stage 3 layers hide it


def measure_syncs(
    clock: Clock,
    config: ModelConfig,
    case: Case,
    groups: Mapping[Span, Sequence[jax.Device]],
    sharing: float,
) -> list[SyncPoint]:
    """Returns how much longer a step takes on each group of devices than on one of them with its own rows.

    `case` is that of one device, where a step takes `sharing` times as long when the others are busy too.
    """
    probes: dict[tuple[int, Span | None, int], Probe] = {}
    for num_patterns in (FEW, MORE):
        model = build_model(cut(config, num_patterns, config.vocab_size))
        probes[model.num_params, None, 0] = probe_step(model, case, case.layout)
        for span, devices in groups.items():
            for stage in ZERO_STAGES:
                layout = Layout.of(ParallelStrategy(dp=len(devices), zero_stage=stage), devices)
                probes[model.num_params, span, stage] = probe_step(model, case, layout)
    seconds = clock.measure(probes)
    return [
        SyncPoint(
            dtype=case.dtype,
            span=span,
            num_devices=len(groups[span]),
            zero_stage=stage,
            num_params=num_params,
            seconds=max(took - seconds[num_params, None, 0] * sharing, 0.0),
        )
        for (num_params, span, stage), took in seconds.items()
        if span is not None
    ]


def probe_step(model: Model, case: Case, layout: Layout) -> Probe:
    """Returns the probe of a training step on a layout, with the case's rows on each of its devices."""
    strategy, optimizer = layout.strategy, Optimizer(config=OptimizerConfig(), total_updates=1000)
    rows = make_batch(case, model.config.vocab_size, num_rows=case.rows * strategy.dp)
    batch = place_batch(rows, train_rules(strategy), layout)
    shardings = train_state_shardings(model, optimizer, layout)
    held = [init_train_state(init_params(model, shardings.params, 0), optimizer, shardings)]
    loss = Loss(head="logprobs", fn=partial(sum_loss, "logprobs"))
    step = jax.jit(
        make_train_step(model, loss, optimizer, layout, TrainOptions(compute=case.compute)), donate_argnums=0
    )

    def run() -> Any:
        held[0], metrics = step(held[0], batch)
        return held[0], metrics

    return run


def measure_rounds(
    clock: Clock, config: ModelConfig, case: Case, groups: Mapping[Span, Sequence[jax.Device]], sharing: float
) -> list[RoundPoint]:
    """Returns how much longer a round of decoding takes on each group than on one device, see `measure_syncs`."""
    model = build_model(cut(config, FEW, SMALL_VOCAB))
    layouts: dict[Span | None, Layout] = {None: case.layout}
    layouts |= {span: Layout.of(ParallelStrategy(dp=len(devices)), devices) for span, devices in groups.items()}
    probes: dict[Span | None, Probe] = {}
    for span, layout in layouts.items():
        params = _draw_params(model, case.dtype, layout)
        probes[span] = probe_decode(model, params, replace(case, layout=layout, rows=case.rows * layout.strategy.dp))
    seconds = clock.measure(probes)
    return [
        RoundPoint(
            span=span,
            num_devices=len(devices),
            seconds=max(seconds[span] - seconds[None] * sharing, 0.0) / CHUNK_LEN,
        )
        for span, devices in groups.items()
    ]


def measure_moves(
    clock: Clock, config: ModelConfig, dtype: str, groups: Mapping[Span, Sequence[jax.Device]]
) -> list[MovePoint]:
    """Returns how long parameters take from the first device of each group to all of it, as a call's do."""
    probes: dict[tuple[Span, int], Probe] = {}
    for num_patterns in (FEW, MORE):
        model = build_model(cut(config, num_patterns, config.vocab_size))
        for span, devices in groups.items():
            size = model.num_params * jax.numpy.dtype(dtype).itemsize
            probes[span, size] = probe_move(model, dtype, devices)
    seconds = clock.measure(probes)
    return [MovePoint(span=span, num_bytes=size, seconds=took) for (span, size), took in seconds.items()]


def probe_move(model: Model, dtype: str, devices: Sequence[jax.Device]) -> Probe:
    """Returns the probe of a model's parameters on their way from the first device to all."""
    params = _draw_params(model, dtype, Layout.of(ParallelStrategy(), devices[:1]))
    destination = _place(model, Layout.of(ParallelStrategy(dp=len(devices)), devices))
    return lambda: reshard(params, destination)[0]


def _draw_params(model: Model, dtype: str, layout: Layout) -> Tree:
    cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))
    return cast(init_params(model, _place(model, layout), 0))


def _place(model: Model, layout: Layout) -> Tree:
    return tree_shardings(model.axes, model.abstract, inference_rules(layout.strategy), layout)
