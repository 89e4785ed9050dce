"""Forward passes on P pipeline stages: layers over the `pipe` axis, micro-batches of rows handed from stage to stage.

One SPMD program: at tick t stage s works on micro-batch t - s, so M of them take M + P - 1 ticks. The other mesh axes
stay with XLA. The embedding and the head are outside: the vocabulary is split over `tensor` and `pipe`, so that no
stage computes them for nothing. Training goes through the stages and back, see `pipeline_gradients.py`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import rows_per_device
from realjax.core.layout import Layout
from realjax.engine.manual_axes import hand_on, over_stages, stage_index
from realjax.engine.rows import deal_rows, join_rows
from realjax.models.config import cut_order
from realjax.models.stacks import Aux, Blocks, PerRow, RunLayersFn, Stacks


def make_run_layers(layout: Layout, run_stage_fn: RunLayersFn) -> RunLayersFn:
    """Returns how stacked layers run in `layout`, in stages where it has several; `run_stage_fn` runs those of one."""
    return run_stage_fn if layout.strategy.pp == 1 else make_pipeline(layout, run_stage_fn)


def num_stage_batches(num_rows: int, layout: Layout) -> int:
    """Returns the number of micro-batches of a pass: the most, up to two a stage, that leave each device whole rows."""
    num_local = rows_per_device(num_rows, layout)
    return next(n for n in range(2 * layout.strategy.pp, 0, -1) if num_local % n == 0)


def num_step_batches(num_rows: int, num_mbs: int, layout: Layout) -> int:
    """Returns the number of micro-batches of a training step, which is cut in `num_mbs` parts as large as a pass."""
    return num_mbs * num_stage_batches(num_rows // num_mbs, layout)


def bubble_share(num_rows: int, num_mbs: int, layout: Layout) -> float:
    """Returns the share of a training step in which a stage has nothing to do: (P-1) / (M+P-1) of M micro-batches."""
    num_bubbles = layout.strategy.pp - 1
    return num_bubbles / (num_step_batches(num_rows, num_mbs, layout) + num_bubbles)


def make_pipeline(layout: Layout, run_stage_fn: RunLayersFn) -> RunLayersFn:
    """Returns how layers run whose stacks are split over the stages; `run_stage_fn` runs those of one stage.

    Raises ValueError, when it is traced, where stages would have different kinds of layer.
    """
    num_stages = layout.strategy.pp

    def run_layers(
        blocks: Blocks, order: tuple[str, ...], stacks: Stacks, x: Array, per_row: PerRow
    ) -> tuple[Array, Aux]:
        num_batches, stage_order = num_stage_batches(x.shape[0], layout), cut_order(order, num_stages)

        def stage(stacks: Stacks, inputs: Array, per_row: PerRow) -> tuple[Array, Aux]:
            index = stage_index()

            def tick(received: Array, t: Array) -> tuple[Array, tuple[Array, Aux]]:
                turn = jnp.clip(t - index, 0, num_batches - 1)
                x = jnp.where(index == 0, inputs[turn], received)
                own_rows = jax.tree.map(lambda rows: rows[turn], per_row)
                x, terms = run_stage_fn(blocks, stage_order, stacks, x, own_rows)
                # Before its first micro-batch comes, and after its last, a stage computes for nothing.
                terms = jax.tree.map(lambda term: jnp.where(turn == t - index, term, 0), terms)
                return hand_on(x, num_stages, is_ring=False), (x, terms)

            ticks = jnp.arange(num_batches + num_stages - 1)
            outputs, terms = jax.lax.scan(tick, jnp.zeros_like(inputs[0]), ticks)[1]
            return outputs[None, num_stages - 1 :], jax.tree.map(lambda term: term.sum(axis=0)[None], terms)

        inputs, per_row = deal_rows((x, per_row), num_batches)
        outputs, terms = over_stages(stage, layout, num_split=1)(stacks, inputs, per_row)
        # As they are: XLA would widen 16-bit numbers before it sends them to all devices.
        last = jax.lax.optimization_barrier(outputs[-1])
        return join_rows(last), jax.tree.map(lambda term: term.sum(axis=0), terms)

    return run_layers
