"""Where the last answers of a generate call go on, see `engine/tail.py`."""

import math
from collections.abc import Sequence

from realjax.allocation.plan import TailShape
from realjax.core.layout import Layout, ParallelStrategy
from realjax.dataflow.graph import Generate
from realjax.models.config import ModelConfig


def shape_tail(
    mfc: Generate, layout: Layout, config: ModelConfig, num_slots: int, *, is_evaluation: bool
) -> TailShape | None:
    """Returns where the last answers of a call go on that decodes `num_slots` at once; None where they stay.

    Those of an evaluation stay where it has too few. Raises ValueError for a layout or a model where that cannot be.
    """
    if not mfc.tail_slots:
        return None
    s, name = layout.strategy, mfc.placement
    if mfc.turns is not None:
        raise ValueError(
            f"gen.tail_slots: found {mfc.tail_slots} with env.path, where rows that end come back for their next turn; "
            "set it to null"
        )
    if (fault := find_tail_fault(s)) is not None:
        raise ValueError(f"gen.tail_slots: found {mfc.tail_slots}, but {name} {fault}; change that, or set it to null")
    sizes = (config.num_q_heads, config.ffn_size, config.vocab_size)
    possible = list_tail_sizes(s, sizes)
    tp = mfc.tail_tp or max(possible, default=0)
    if tp not in possible:
        raise ValueError(
            f"gen.tail_model_parallel_size: found {mfc.tail_tp}; on {name}'s {s} a layer of this model can be shared "
            f"by {possible or 'no more devices than now'}; take one of these, or set gen.tail_slots to null"
        )
    wanted = round_tail(mfc.tail_slots, s)
    if wanted >= num_slots:
        if is_evaluation:
            return None
        raise ValueError(
            f"gen.tail_slots: {mfc.tail_slots} (in a multiple of data={s.dp}: {wanted}) is not below the {num_slots} "
            f"answers that {name} decodes at once; lower it, or set it to null"
        )
    return TailShape(layout=layout.share_layers(tp), num_slots=wanted)


def find_tail_fault(strategy: ParallelStrategy) -> str | None:
    """Returns why answers cannot go on with more tensor parallelism on a layout's devices; None where they can."""
    if strategy.pp > 1:
        return f"has {strategy.pp} pipeline stages, and answers can only move from one"
    if strategy.ep > 1:
        return f"has {strategy.ep} devices that share experts, which then would have to move"
    return "has data_parallel_size=1: all its devices share each layer already" if strategy.dp == 1 else None


def list_tail_sizes(strategy: ParallelStrategy, sizes: Sequence[int]) -> list[int]:
    """Returns how many devices of a layout could share each layer of a model whose dims `sizes` they split."""
    return [
        strategy.tp * factor
        for factor in range(2, strategy.dp + 1)
        if strategy.dp % factor == 0 and not any(size % (strategy.tp * factor) for size in sizes)
    ]


def round_tail(num_slots: int, strategy: ParallelStrategy) -> int:
    """Returns slots that those along `data` share out: a multiple of them."""
    return math.ceil(num_slots / strategy.dp) * strategy.dp
