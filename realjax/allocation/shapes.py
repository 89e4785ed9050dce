"""Shapes that follow from layouts: of rows, and of the answers that are decoded at once."""

import math
from collections.abc import Mapping
from dataclasses import replace

from realjax.allocation.choice import Choice
from realjax.allocation.plan import RolloutShape
from realjax.allocation.tails import shape_tail
from realjax.allocation.workload import CallWork
from realjax.core.layout import Layout
from realjax.data.loader import Loader, Rows
from realjax.data.packing import MOST_TOKENS, rollout_row_len
from realjax.dataflow.graph import Generate, Inference, ModelCall, Train
from realjax.dataflow.run import Evaluation, RolloutEvaluation, RunSpec

# Rows decoded at once where nothing else is asked for: enough to keep an accelerator's matrix units busy.
MOST_SLOTS = 256


def row_multiple(mfc: ModelCall, layout: Layout) -> int:
    """Returns what a batch's rows must be a multiple of, to divide over the call's devices and micro-batches."""
    return layout.strategy.row_multiple * count_micro_batches(mfc)


def count_micro_batches(mfc: ModelCall) -> int:
    """Returns how many micro-batches a call was asked to make of a batch; 1 where it goes by their tokens."""
    return (mfc.micro_batches.count or 1) if isinstance(mfc, Inference | Train) else 1


def shape_rollouts(spec: RunSpec, layouts: Mapping[str, Layout]) -> dict[str, RolloutShape]:
    """Returns the shapes of what each generate call makes. Raises ValueError for more tokens than XLA can count."""
    multiples = {mfc.name: row_multiple(mfc, layouts[mfc.name]) for mfc in spec.graph.mfcs}
    readers = [multiples[mfc.name] for mfc in spec.graph.mfcs if isinstance(mfc, Inference)]
    shapes: dict[str, RolloutShape] = {}
    own = {mfc.name for mfc in spec.graph.mfcs}
    for mfc in spec.mfcs:
        if isinstance(mfc, Generate):
            # Answers of an evaluation lie in rows like those that are trained on: fewer programs.
            like, layout = shapes.get(mfc.placement), layouts[mfc.name]
            num_slots = choose_num_slots(mfc, layout)
            shapes[mfc.name] = RolloutShape(
                row_len=like.row_len if like else _choose_row_len(spec, mfc, math.lcm(*multiples.values())),
                row_multiple=math.lcm(row_multiple(mfc, layout), *readers),
                num_slots=num_slots,
                tail=shape_tail(mfc, layout, spec.roles[mfc.role].config, num_slots, is_evaluation=mfc.name not in own),
            )
    return shapes


def _choose_row_len(spec: RunSpec, mfc: Generate, multiple: int) -> int:
    assert mfc.max_seqlen, f"{mfc.name}: a generate call says how long answers can be"
    if (num_tokens := max(mfc.num_answers, multiple) * mfc.max_seqlen) > MOST_TOKENS:
        raise ValueError(
            f"dataset.train_bs_n_seqs: {mfc.num_answers} answers a step, in rows that are a multiple of {multiple} "
            f"(devices times n_mbs), of up to {mfc.max_seqlen} tokens are {num_tokens} tokens, but a step has at "
            f"most {MOST_TOKENS}; lower it, the answers to each prompt, n_mbs or gen.max_new_tokens"
        )
    trained = [call.minibatches.count for call in spec.graph.mfcs if isinstance(call, Train) and call.minibatches]
    return rollout_row_len(mfc.max_seqlen, mfc.num_answers // max(trained, default=1), multiple)


def choose_num_slots(mfc: Generate, layout: Layout) -> int:
    """Returns how many answers are decoded at once: as many as are wanted, at most those of a step, rounded up.

    Raises ValueError for a wanted number that the layout cannot share out.
    """
    multiple = layout.strategy.row_multiple
    if mfc.num_slots is not None and mfc.num_slots % multiple:
        raise ValueError(
            f"gen.num_slots: {mfc.num_slots} answers at once cannot be divided over data x pipeline = {multiple} "
            "devices; use a multiple of it, or null"
        )
    return round_slots(mfc.num_answers, mfc.num_slots, multiple)


def count_slots(work: CallWork, choice: Choice) -> int:
    """Returns the same of a call as the planner sees it."""
    return round_slots(work.num_sequences, choice.num_slots, choice.strategy.row_multiple)


def round_slots(num_answers: int, num_slots: int | None, multiple: int) -> int:
    """Returns how many of a step's answers are decoded at once: as many as are wanted, in a multiple."""
    return -(-min(num_answers, num_slots or MOST_SLOTS) // multiple) * multiple


def shape_batches(
    spec: RunSpec, layouts: Mapping[str, Layout], rollouts: Mapping[str, RolloutShape]
) -> tuple[Loader, dict[str, Loader]]:
    """Returns the loaders of the training and the held-out sets, their batches in rows that divide over their readers.

    The same rows serve all calls of a step, so they divide over every layout. Prompts are read on the host. Raises
    ValueError for fewer sequences than devices and micro-batches.
    """
    mfcs = [mfc for mfc in spec.graph.mfcs if not isinstance(mfc, Generate)]
    multiple = math.lcm(*(row_multiple(mfc, layouts[mfc.name]) for mfc in mfcs))
    if any(isinstance(mfc, Generate) for mfc in spec.graph.mfcs):
        row_len = max(shape.row_len for shape in rollouts.values())
        return spec.loader, _shape_held_out(spec, Rows(multiple=multiple), row_len)
    # Rows are dealt out evenly for the call that takes longest.
    reader = next((mfc for mfc in mfcs if isinstance(mfc, Train)), mfcs[0])
    num_shards, num_mbs = layouts[reader.name].strategy.dp, reader.micro_batches.count or 1
    if spec.loader.batch_size < num_shards * num_mbs:
        raise ValueError(
            f"dataset.train_bs_n_seqs: {spec.loader.batch_size} sequences cannot be divided over {num_shards} "
            f"data-parallel devices x {num_mbs} micro-batches; use at least {num_shards * num_mbs}, "
            "fewer devices (n_gpus_per_node), or sizes that share the model instead, such as d1p1m2"
        )
    rows = Rows(multiple=multiple, num_shards=num_shards)
    loader = spec.loader.split(rows)
    return loader, _shape_held_out(spec, rows, loader.shapes.row_len)


def _shape_held_out(spec: RunSpec, rows: Rows, row_len: int) -> dict[str, Loader]:
    """Returns the loaders of the held-out sets, whose rows are as long as training's where they can be."""

    def shape(evaluation: Evaluation | RolloutEvaluation) -> Loader:
        held_out = evaluation.loader
        if isinstance(evaluation, RolloutEvaluation):
            return held_out
        # So a bound on tokens that holds one row there holds one here.
        return held_out.split(replace(rows, row_len=row_len if held_out.longest_example <= row_len else None))

    return {name: shape(evaluation) for name, evaluation in spec.evaluations.items()}
