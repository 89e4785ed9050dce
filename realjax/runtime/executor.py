"""Runs a dataflow graph: take inputs, bring parameters to the call's layout, call, merge outputs."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import networkx as nx
import numpy as np
from jax import Array

from realjax.core.axes import Rules, inference_rules, train_rules, tree_shardings
from realjax.core.batch import Batch
from realjax.core.layout import Layout
from realjax.core.loss import LossSums
from realjax.core.metrics import Metric
from realjax.core.trees import Tree
from realjax.dataflow.graph import MFC, DataflowGraph, HostCall
from realjax.dataflow.run import Evaluation, MovingAverage
from realjax.engine.batching import generate
from realjax.engine.compiled import CompileLog, batch_shardings, place_array
from realjax.engine.state import TrainState
from realjax.record.timeline import Timeline
from realjax.reshard.apply import ema_update, reshard
from realjax.reshard.fetch import fetch, fetch_arrays
from realjax.runtime.finite import refuse_nonfinite
from realjax.runtime.memory import bytes_held_beside
from realjax.runtime.programs import Programs, num_micro_batches, row_multiple
from realjax.runtime.roles import Role
from realjax.runtime.rollouts import (
    choose_num_slots,
    make_minibatches,
    make_requests,
    pack_rollout,
    target_indices,
)

logger = logging.getLogger("realjax.executor")
PACKING_KEYS = ("tokens", "segment_ids", "positions")

Controls = dict[str, dict[str, float]]
Metrics = Mapping[str, Metric]  # of a training call, its sums are still on the devices


@dataclass(frozen=True)
class StepResult:
    """What a step leaves: the batch with all keys, and of each call its metrics, one dict for each update."""

    batch: Batch
    metrics: dict[str, list[Metrics]]


class Executor:
    """Holds what changes during a run, the roles' states and the host calls' controls, and the compiled calls."""

    def __init__(
        self,
        graph: DataflowGraph,
        layouts: Mapping[str, Layout],
        roles: Mapping[str, Role],
        states: dict[str, TrainState | Tree],
        *,
        seed: int = 0,
        controls: Mapping[str, Mapping[str, float]] | None = None,
        averages: Sequence[MovingAverage] = (),
    ) -> None:
        """`controls` are the host calls' states by name where they are not those before the first step."""
        self.graph, self.layouts, self.roles, self.states = graph, layouts, roles, states
        host_calls = [call for call in graph.calls if isinstance(call, HostCall)]
        self.controls: Controls = {call.name: dict((controls or {}).get(call.name, call.state)) for call in host_calls}
        self.averages = averages
        self.programs, self.timeline = Programs(seed), Timeline()
        self._moved: set[str] = set()  # calls whose first move of parameters has been logged

    def step(self, batch: Batch, step: int = 0) -> StepResult:
        """Runs every call once on a host batch; the metrics of training calls are still on the devices."""
        result = self.run_calls(self.graph.order, batch, step)
        for average in self.averages:
            self.states[average.role] = ema_update(self.params(average.role), self.params(average.source), average.eta)
        return result

    def run_calls(self, calls: Iterable[MFC | HostCall], batch: Batch, step: int | None) -> StepResult:
        """Runs the calls in the order given; `step` None is an evaluation, which leaves no trace: not in the timeline,
        and not in what host calls carry from step to step.
        """
        metrics: dict[str, list[Metrics]] = {}
        run = {"generate": self._generate, "inference": self._infer, "train_step": self._train}
        for call in calls:
            if isinstance(call, HostCall):
                batch, metrics[call.name] = self._compute(call, batch, step)
            else:
                batch, of_call = run[call.call](call, batch, step)
                metrics |= {call.name: of_call} if of_call else {}
        return StepResult(batch, metrics)

    def _generate(self, mfc: MFC, prompts: Batch, step: int | None) -> tuple[Batch, list[Metrics]]:
        """Returns the batch of prompts with their continuations, in place of the prompts."""
        assert (sampling := mfc.sampling) is not None, f"{mfc.name}: a generate call says how it samples"
        start, layout = self.timeline.now(), self.layouts[mfc.name]
        requests = make_requests(prompts, sampling, step or 0)
        num_slots = choose_num_slots(sampling.num_slots, len(requests), layout)
        slots = self.programs.slots(mfc, self.roles[mfc.role], layout, num_slots)
        params, bytes_moved = self._params_for(mfc)
        generations = generate(slots, params, requests, fetch_fn=fetch)
        refuse_nonfinite(generations, f"{mfc.name}: {self.roles[mfc.role].spec.title}")
        peak_bytes = self._peak_bytes(mfc, params, slots.device_bytes)
        readers = [(other, self.layouts[other.name]) for other in self.graph.mfcs if other.call == "inference"]
        rollout = pack_rollout(requests, generations, sampling, row_multiple([(mfc, layout), *readers]))
        self._watch(
            mfc,
            (),
            start=start,
            step=step,
            num_tokens=rollout.num_tokens,
            bytes_moved=bytes_moved,
            peak_bytes=peak_bytes,
        )
        return rollout, []

    def _infer(self, mfc: MFC, batch: Batch, step: int | None) -> tuple[Batch, list[Metrics]]:
        """Returns the batch with the call's key."""
        start, layout, role = self.timeline.now(), self.layouts[mfc.name], self.roles[mfc.role]
        inputs = self._place(batch, mfc)
        program = self.programs.inference(mfc, role, layout, num_micro_batches(mfc, inputs, layout))
        # A copy made for this call is dropped with this name, when the call no longer needs it.
        params, bytes_moved = self._params_for(mfc)
        results = program(params, inputs)
        self._watch(
            mfc,
            results,
            start=start,
            step=step,
            num_tokens=batch.num_tokens,
            bytes_moved=bytes_moved,
            peak_bytes=self._peak_bytes(mfc, params, program.device_bytes),
        )
        (key,) = mfc.outputs
        return batch.with_arrays(**{key: results[mfc.head or key]}), []

    def _train(self, mfc: MFC, batch: Batch, step: int | None) -> tuple[Batch, list[Metrics]]:
        """Updates the role, once or for each minibatch, and returns the metrics of each update."""
        start, layout, role = self.timeline.now(), self.layouts[mfc.name], self.roles[mfc.role]
        metrics: list[Metrics] = []
        num_tokens = program_bytes = 0
        first = (step or 0) * self.graph.num_updates(mfc.role)
        for number, part in enumerate(self._minibatches(mfc, batch, step), start=first):
            inputs = self._place(part, mfc)
            program = self.programs.train_step(mfc, role, layout, num_micro_batches(mfc, inputs, layout))
            # From the step, so that updates that fell away count too, and the schedule ends with the run.
            counter = place_array(np.asarray(number, np.int32), layout.replicated)
            state = cast(TrainState, self.states[mfc.role]).replace(num_updates=counter)
            self.states[mfc.role], of_update = program(state, inputs)
            metrics.append(of_update)
            num_tokens += part.num_tokens
            program_bytes = max(program_bytes, program.device_bytes)
        self._watch(
            mfc,
            metrics,
            start=start,
            step=step,
            num_tokens=num_tokens,
            bytes_moved=0,
            peak_bytes=self._peak_bytes(mfc, self.states[mfc.role], program_bytes),
        )
        return batch, metrics

    def _minibatches(self, mfc: MFC, batch: Batch, step: int | None) -> Iterable[Batch]:
        if (minibatches := mfc.minibatches) is None:
            yield batch
            return
        keys = {*PACKING_KEYS, *mfc.inputs}
        batch = batch.select(keys).replace_arrays(**self._on_host(batch, mfc.inputs))
        multiple = row_multiple([(mfc, self.layouts[mfc.name])])
        for number in range(minibatches.passes):
            seed = (self.programs.seed, step or 0, number)
            yield from make_minibatches(batch, minibatches, row_multiple=multiple, seed=seed)

    def _compute(self, call: HostCall, batch: Batch, step: int | None) -> tuple[Batch, list[Metrics]]:
        """Returns the batch with a host call's keys, all that it read now on the host too, and its metrics."""
        arrays = self._on_host(batch, (*PACKING_KEYS, *call.inputs))
        result = call.fn(arrays, self.controls.get(call.name, call.state))
        if step is not None and call.name in self.controls:
            self.controls[call.name] = dict(result.state)
        return batch.replace_arrays(**arrays).with_arrays(**result.arrays), [result.metrics]

    def _on_host(self, batch: Batch, keys: Iterable[str]) -> dict[str, np.ndarray]:
        wanted = {key: batch[key] for key in keys}
        fetched = fetch_arrays({key: array for key, array in wanted.items() if isinstance(array, Array)})
        return wanted | fetched

    def _place(self, batch: Batch, mfc: MFC) -> Batch:
        """Returns the call's inputs on its devices: host arrays are put there, other calls' results moved there."""
        refuse_longer(batch, mfc.max_seqlen, mfc.name)
        layout = self.layouts[mfc.name]
        inputs = batch.select({*PACKING_KEYS, *mfc.inputs})
        if mfc.mask and (targets := target_indices(batch[mfc.mask], batch["positions"])) is not None:
            inputs = inputs.with_arrays(targets=targets)
        return put_batch(inputs, train_rules(layout.strategy), layout)

    def _params_for(self, mfc: MFC) -> tuple[Tree, int]:
        """Returns the role's parameters where the call needs them, and the bytes that had to move for it."""
        role, layout, params = self.roles[mfc.role], self.layouts[mfc.name], self.params(mfc.role)
        if layout == role.home and not role.is_offloaded:
            return params, 0
        shardings = tree_shardings(role.model.axes, role.model.abstract, inference_rules(layout.strategy), layout)
        is_first = mfc.name not in self._moved
        if is_first:
            self._moved.add(mfc.name)
            jax.block_until_ready(params)  # so that the seconds logged are those of the move
        copy, report = reshard(params, shardings, dtype=role.forward_options.precision.dtype, block=is_first)
        if is_first:
            source = "host memory" if role.is_offloaded else f"its home {role.home}"
            logger.info("%s: %s from %s: %s", mfc.name, mfc.role, source, report)
        return copy, report.bytes_moved

    def _peak_bytes(self, mfc: MFC, given: Any, program_bytes: int) -> int:
        """Returns what a device of the call holds while its program runs on `given`: the program's, and the rest."""
        return program_bytes + bytes_held_beside(given, self.states, self.layouts[mfc.name].devices)

    def _watch(
        self,
        mfc: MFC,
        results: Any,
        *,
        start: float,
        step: int | None,
        num_tokens: int,
        bytes_moved: int,
        peak_bytes: int,
    ) -> None:
        if step is None:
            return
        role, layout = self.roles[mfc.role], self.layouts[mfc.name]
        # Forward 2 and backward 4 operations a parameter and token; attention's own share is left out.
        per_token = (6 if mfc.call == "train_step" else 2) * role.model.num_params
        self.timeline.watch(
            results,
            start=start,
            step=step,
            name=mfc.name,
            devices=layout.device_names,
            num_tokens=num_tokens,
            num_flops=float(per_token * num_tokens),
            bytes_moved=bytes_moved,
            peak_bytes=peak_bytes,
            after=self._waits_for(mfc),
        )

    def _waits_for(self, mfc: MFC) -> tuple[str, ...]:
        """Returns the earlier model calls of a step on whose results or devices a call has to wait."""
        if mfc.name not in self.graph.edges:
            return ()
        before = self.graph.order[: self.graph.order.index(mfc)]
        sources, devices = nx.ancestors(self.graph.edges, mfc.name), set(self.layouts[mfc.name].devices)
        others = [other for other in before if isinstance(other, MFC)]
        shares = {other.name for other in others if devices & set(self.layouts[other.name].devices)}
        return tuple(other.name for other in others if other.name in sources | shares)

    def evaluate(self, evaluation: Evaluation, batch: Batch) -> LossSums:
        """Returns the loss sums of a held-out batch under the role's current parameters, on the role's home layout."""
        batch = self.run_calls(evaluation.calls, batch, step=None).batch
        role = self.roles[evaluation.role]
        inputs = put_batch(batch, inference_rules(role.home.strategy), role.home)
        program = self.programs.evaluation(evaluation, role, num_micro_batches(evaluation, inputs, role.home))
        return program(self.params(evaluation.role), inputs)

    @property
    def compile_log(self) -> CompileLog:
        """The programs compiled so far."""
        return self.programs.log

    def params(self, role: str) -> Tree:
        """Returns the role's parameters as they stand now."""
        state = self.states[role]
        return state.params if isinstance(state, TrainState) else state


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
