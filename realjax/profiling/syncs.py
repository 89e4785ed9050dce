"""How long a training step takes for what devices with rows of their own tell each other of gradients and parameters.

Collectives by themselves are quicker than those of a step: there they wait for whoever comes last, and share a
processor's core with what is computed beside them. So it is steps that are measured, on one device and on several.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax

from realjax.allocation.measured import Span, SyncPoint
from realjax.core.axes import train_rules
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.loss import Loss
from realjax.core.optimizer_config import OptimizerConfig
from realjax.engine.compiled import place_batch
from realjax.engine.optim import Optimizer
from realjax.engine.state import init_train_state, train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from realjax.models.build import Model, build_model, init_params
from realjax.models.config import ModelConfig
from realjax.profiling.clock import Clock, Probe
from realjax.profiling.layers import FEW, MORE, Case, cut, make_batch, sum_loss

ZERO_STAGES = (0, 2)  # the first sends what the second does, and in the third layers hide it


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
