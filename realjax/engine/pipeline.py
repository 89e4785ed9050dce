"""Pipeline parallelism: layers in stages over the `pipe` axis, micro-batches of rows handed from stage to stage.

One SPMD program (as in GPipe, arXiv:1811.06965): at tick t stage s works on micro-batch t - s, so M micro-batches
through P stages take M + P - 1 ticks. The other mesh axes stay with XLA. The embedding and the head are outside: the
vocabulary is split over `tensor` and `pipe`, so that no stage computes them for nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from realjax.core.axes import rows_per_device
from realjax.core.layout import Layout
from realjax.engine.manual_axes import hand_on, over_stages, stage_index
from realjax.engine.rows import deal_rows, join_rows
from realjax.models.config import cut_order
from realjax.models.stacks import Aux, Blocks, PerRow, RunLayersFn, Stacks, scan_layers


def make_run_layers(layout: Layout, *, unroll: bool = False) -> RunLayersFn:
    """Returns how stacked layers run in `layout`: one after another, or in stages; `unroll` as for `scan_layers`."""
    scan_fn = partial(scan_layers, unroll=unroll)
    return scan_fn if layout.strategy.pp == 1 else make_pipeline(layout, scan_fn)


def num_stage_batches(num_rows: int, layout: Layout) -> int:
    """Returns the number of micro-batches of a pass: the most, up to two a stage, that leave each device whole rows."""
    num_local = rows_per_device(num_rows, layout)
    return next(n for n in range(2 * layout.strategy.pp, 0, -1) if num_local % n == 0)


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
                x = jnp.where(index == 0, inputs[0, turn], received)
                own_rows = jax.tree.map(lambda rows: rows[turn], per_row)
                x, terms = run_stage_fn(blocks, stage_order, stacks, x, own_rows)
                # Before its first micro-batch comes, and after its last, a stage computes for nothing.
                terms = jax.tree.map(lambda term: jnp.where(turn == t - index, term, 0), terms)
                return hand_on(x, num_stages, is_ring=False), (x, terms)

            ticks = jnp.arange(num_batches + num_stages - 1)
            outputs, terms = jax.lax.scan(tick, jnp.zeros_like(inputs[0, 0]), ticks)[1]
            return outputs[None, num_stages - 1 :], jax.tree.map(lambda term: term.sum(axis=0)[None], terms)

        # Only the first stage's input and the last stage's output count. Stacking them over the stages, instead of
        # replicating, leaves no sum over `pipe` to the backward pass (in bf16 that sum aborts on CPU).
        inputs = deal_rows(x, num_batches)[None]
        inputs = jnp.concatenate([inputs, jnp.zeros((num_stages - 1, *inputs.shape[1:]), x.dtype)])
        per_row = jax.lax.stop_gradient(deal_rows(per_row, num_batches))
        outputs, terms = over_stages(stage, layout, num_split=2)(stacks, inputs, per_row)
        return join_rows(outputs[-1]), jax.tree.map(lambda term: term.sum(axis=0), terms)

    return run_layers
