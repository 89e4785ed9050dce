"""What each kind of call does with a batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import jax
import numpy as np
from jax import Array

from realjax.core.axes import Rules, train_rules
from realjax.core.batch import Batch
from realjax.core.layout import Layout
from realjax.core.loss import HEAD_OUTPUTS
from realjax.core.metrics import Mean, Metric
from realjax.core.trees import Tree
from realjax.dataflow.graph import Call, Generate, Host, Inference, ModelCall, Train
from realjax.engine.batching import Batcher
from realjax.engine.compiled import batch_shardings, place_array
from realjax.engine.slots import SlotPrograms
from realjax.engine.state import TrainState
from realjax.engine.tail import Tail
from realjax.reshard.apply import reshard
from realjax.reshard.fetch import fetch, fetch_arrays
from realjax.runtime.finite import refuse_nonfinite
from realjax.runtime.memory import bytes_held_beside
from realjax.runtime.programs import num_micro_batches
from realjax.runtime.rollouts import (
    Chosen,
    answer_requests,
    list_targets,
    make_minibatches,
    make_requests,
    pack_rollout,
)
from realjax.runtime.sizes import LEAST, LeastSizes
from realjax.runtime.turns import converse

if TYPE_CHECKING:
    from realjax.runtime.executor import Executor

PACKING_KEYS = ("tokens", "segment_ids", "positions")
Metrics = Mapping[str, Metric]  # of a training call, its sums are still on the devices


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a call leaves: the batch with its keys, its metrics, and what there is to say of its cost."""

    batch: Batch
    metrics: Sequence[Metrics] = ()  # one dict for each update
    results: object = ()  # arrays that are ready when the call is; none: it has waited itself
    num_tokens: int = 0
    bytes_moved: int = 0
    peak_bytes: int = 0  # on the fullest of its devices
    per_round: Mean = Mean(0, 0)  # tokens that a row has drawn in a round, where they may be several


def generate(executor: "Executor", mfc: Generate, prompts: Batch, step: int | None) -> Done:
    """Makes the batch of prompts with their continuations, in place of the prompts."""
    requests, shape = make_requests(prompts, mfc, step or 0), executor.plan.rollouts[mfc.name]
    slots, tail = executor.programs.slots(mfc), executor.programs.tail(mfc)
    moved_before = tail.bytes_moved if tail else 0
    # Each is made ready as it arrives: the call has no second copy of them.
    leaves, bytes_moved = executor.params_for(mfc, slots.prepare_leaf)
    params = slots.join(leaves)
    batcher = Batcher(slots, params, stop_fn=mfc.stop_fn, fetch_fn=fetch, tail=tail)
    if mfc.turns is None:
        generations, extras = answer_requests(requests, mfc, batcher.answer), None
    else:
        calls = executor.environments(mfc.turns)
        dialogues = converse(batcher, requests, mfc.turns, executor.seed, calls)
        requests = [replace(one, tokens=row.prompt) for one, row in zip(requests, dialogues, strict=True)]
        generations, extras = [row.generation for row in dialogues], [row.arrays() for row in dialogues]
    refuse_nonfinite(generations, f"{mfc.name}: {executor.roles[mfc.role].spec.title}")
    rollout = pack_rollout(requests, generations, mfc, shape, sizes=executor.sizes.of(mfc.name), extras=extras)
    peak_bytes = find_peak_bytes(executor, mfc, params, find_slots_bytes(slots, tail, params))
    bytes_moved += tail.bytes_moved - moved_before if tail else 0
    return Done(
        batch=rollout,
        num_tokens=rollout.num_tokens,
        bytes_moved=bytes_moved,
        peak_bytes=peak_bytes,
        per_round=batcher.per_round,
    )


def infer(executor: "Executor", mfc: Inference, batch: Batch, step: int | None) -> Done:
    """Adds the call's keys."""
    sizes = executor.sizes.of(mfc.name)
    chosen = choose_sequences(mfc, batch, executor.plan.row_multiples[mfc.name], sizes)
    inputs, layout = _place(executor, mfc, chosen.batch if chosen else batch), executor.plan.layouts[mfc.name]
    program = executor.programs.inference(mfc, num_micro_batches(mfc, inputs, layout))
    # A copy made for this call is dropped with this name, when the call no longer needs it.
    params, bytes_moved = executor.params_for(mfc)
    results = program(params, inputs)
    outputs = {key: results[name] for key, name in zip(mfc.outputs, HEAD_OUTPUTS[mfc.head], strict=True)}
    if chosen:
        outputs = {key: chosen.put_back(x, batch.num_rows) for key, x in fetch_arrays(outputs).items()}
    return Done(
        batch=batch.with_arrays(**outputs),
        results=results,
        num_tokens=(chosen.batch if chosen else batch).num_tokens,
        bytes_moved=bytes_moved,
        peak_bytes=find_peak_bytes(executor, mfc, params, program.device_bytes),
    )


def train(executor: "Executor", mfc: Train, batch: Batch, step: int | None) -> Done:
    """Updates the role, once or for each minibatch."""
    layout, metrics = executor.plan.layouts[mfc.name], list[Metrics]()
    num_tokens = program_bytes = 0
    base = executor.base_for(mfc.role)
    for number, part in enumerate(_minibatches(executor, mfc, batch, step), start=(step or 0) * mfc.num_updates):
        inputs = _place(executor, mfc, part)
        program = executor.programs.train_step(mfc, num_micro_batches(mfc, inputs, layout))
        # From the step, so that updates that fell away count too, and the schedule ends with the run.
        counter = place_array(np.asarray(number, np.int32), layout.replicated)
        state = cast(TrainState, executor.states[mfc.role]).replace(num_updates=counter)
        executor.states[mfc.role], of_update = program(state, inputs, *base)
        metrics.append(of_update)
        num_tokens += part.num_tokens
        program_bytes = max(program_bytes, program.device_bytes)
    peak_bytes = find_peak_bytes(executor, mfc, (executor.states[mfc.role], base), program_bytes)
    return Done(batch=batch, metrics=metrics, results=metrics, num_tokens=num_tokens, peak_bytes=peak_bytes)


def compute(executor: "Executor", call: Host, batch: Batch, step: int | None) -> Done:
    """Adds a host call's keys; all that it read is on the host from then on."""
    arrays = read_arrays(batch, call)
    result = call.fn(arrays, executor.controls.get(call.name, call.state))
    if step is not None and call.name in executor.controls:
        executor.controls[call.name] = dict(result.state)
    return Done(batch=batch.replace_arrays(**arrays).with_arrays(**result.arrays), metrics=[result.metrics])


def read_arrays(batch: Batch, call: Host) -> dict[str, np.ndarray]:
    """Returns what a host call reads of a batch."""
    return _on_host(batch, (*PACKING_KEYS, *call.inputs))


RUN: dict[type[Call], Callable[..., Done]] = {Generate: generate, Inference: infer, Train: train, Host: compute}


def _minibatches(executor: "Executor", mfc: Train, batch: Batch, step: int | None) -> Iterable[Batch]:
    if (minibatches := mfc.minibatches) is None:
        yield batch
        return
    batch = batch.select({*PACKING_KEYS, *mfc.inputs}).replace_arrays(**_on_host(batch, mfc.inputs))
    multiple = executor.plan.row_multiples[mfc.name]
    for number in range(minibatches.passes):
        seed, sizes = (executor.seed, step or 0, number), executor.sizes.of(mfc.name)
        yield from make_minibatches(batch, minibatches, row_multiple=multiple, seed=seed, sizes=sizes)


def _on_host(batch: Batch, keys: Iterable[str]) -> dict[str, np.ndarray]:
    wanted = {key: batch[key] for key in keys}
    return wanted | fetch_arrays({key: array for key, array in wanted.items() if isinstance(array, Array)})


def _place(executor: "Executor", mfc: Inference | Train, batch: Batch) -> Batch:
    """Returns the call's inputs on its devices: host arrays are put there, other calls' results moved there."""
    layout = executor.plan.layouts[mfc.name]
    inputs = select_inputs(mfc, batch, executor.sizes.of(mfc.name))
    return put_batch(inputs, train_rules(layout.strategy), layout)


def choose_sequences(mfc: Inference, batch: Batch, row_multiple: int, sizes: LeastSizes = LEAST) -> Chosen | None:
    """Returns the sequences that a call computes in rows of their own; None where those are all."""
    if mfc.only is None:
        return None
    inputs = batch.select({*PACKING_KEYS, *mfc.inputs})
    return Chosen.of(inputs.replace_arrays(**_on_host(inputs, inputs.keys())), mfc.only, row_multiple, sizes)


def select_inputs(mfc: Inference | Train, batch: Batch, sizes: LeastSizes = LEAST) -> Batch:
    """Returns what a call reads of a batch. Raises ValueError for a sequence longer than the call was told."""
    refuse_longer(batch, mfc.max_seqlen, mfc.name)
    inputs = batch.select({*PACKING_KEYS, *mfc.inputs})
    if "targets" in batch and mfc.head != "values":
        return inputs.with_arrays(targets=batch["targets"])
    if mfc.mask and (targets := list_targets(batch[mfc.mask], batch["positions"], sizes)) is not None:
        inputs = inputs.with_arrays(targets=targets)
    return inputs


def put_batch(batch: Batch, rules: Rules, layout: Layout) -> Batch:
    """Returns the batch on the layout's devices: host arrays are put there, other calls' results moved there."""
    results = {key: batch[key] for key in batch if isinstance(batch[key], Array)}
    places = batch_shardings(batch, rules, layout)
    moved, _ = reshard(results, {key: places[key] for key in results})
    fresh = {key: place_array(batch[key], places[key]) for key in batch if key not in results}
    return Batch(arrays=fresh | moved)


def refuse_longer(batch: Batch, max_seqlen: int | None, subject: str) -> None:
    """Raises ValueError when a sequence is longer than the call was told: its attention would be cut off unseen."""
    positions = batch["positions"]
    if (
        max_seqlen is not None
        and isinstance(positions, np.ndarray)
        and (longest := int(positions.max()) + 1) > max_seqlen
    ):
        raise ValueError(
            f"{subject}: a sequence of {longest} tokens, but max_seqlen={max_seqlen}; raise it to the longest"
        )


def find_slots_bytes(slots: SlotPrograms, tail: Tail | None, params: Tree) -> int:
    """Returns what the larger of a generate call's programs took of a device; those of its last rows have parameters of
    their own beside the call's.
    """
    if tail is None or not tail.programs.device_bytes:
        return slots.device_bytes
    beside = bytes_held_beside((), params, slots.layout.devices)
    return max(slots.device_bytes, tail.programs.device_bytes + beside)


def find_peak_bytes(executor: "Executor", mfc: ModelCall, given: object, program_bytes: int) -> int:
    """Returns what a device of the call holds while its program runs on `given`: the program's, and the rest."""
    devices: Iterable[jax.Device] = executor.plan.layouts[mfc.name].devices
    return program_bytes + bytes_held_beside(given, (executor.states, executor.bases.trees), devices)
