"""Runs a dataflow graph: take inputs, bring parameters to the call's layout, call, merge outputs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jax import Array

from realjax.core.axes import Rules, inference_rules, train_rules, tree_shardings
from realjax.core.batch import Batch
from realjax.core.layout import Layout
from realjax.core.loss import LossSums
from realjax.core.trees import Tree, num_params
from realjax.dataflow.graph import MFC, DataflowGraph
from realjax.dataflow.run import Evaluation
from realjax.engine.compiled import Compiled, CompileLog, place_batch
from realjax.engine.inference import make_evaluation, make_inference
from realjax.engine.state import TrainState, train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from realjax.reshard.apply import reshard
from realjax.runtime.roles import Role
from realjax.runtime.timeline import Timeline

PACKING_KEYS = ("tokens", "segment_ids", "positions")


class Executor:
    """Holds the states of all roles, the one thing that changes during a run, and the compiled calls on them."""

    def __init__(
        self,
        graph: DataflowGraph,
        layouts: Mapping[str, Layout],
        roles: Mapping[str, Role],
        states: dict[str, TrainState | Tree],
    ) -> None:
        self.graph, self.layouts, self.roles, self.states = graph, layouts, roles, states
        self.compile_log, self.timeline = CompileLog(), Timeline()
        self._programs: dict[Any, Callable[..., Any]] = {}

    def step(self, batch: Batch, step: int = 0) -> dict[str, Mapping[str, Array]]:
        """Runs every call once on a host batch; returns the metrics of each training call, still on the devices."""
        metrics: dict[str, Mapping[str, Array]] = {}
        for mfc in self.graph.order:
            start = self.timeline.now()
            inputs = self._place(batch, mfc)
            program = self._program(mfc, inputs)
            if mfc.call == "train_step":
                self.states[mfc.role], metrics[mfc.name] = program(self.states[mfc.role], inputs)
                results, bytes_moved = metrics[mfc.name], 0
            else:
                batch, results, bytes_moved = self._infer(batch, mfc, program, inputs)
            self._watch(mfc, results, start=start, step=step, bytes_moved=bytes_moved, num_tokens=batch.num_tokens)
        return metrics

    def _place(self, batch: Batch, mfc: MFC) -> Batch:
        """Returns the call's inputs on its devices: host arrays are put there, other calls' results moved there."""
        refuse_longer(batch, mfc.max_seqlen, mfc.name)
        layout = self.layouts[mfc.name]
        return put_batch(batch.select({*PACKING_KEYS, *mfc.inputs}), train_rules(layout.strategy), layout)

    def _infer(
        self, batch: Batch, mfc: MFC, program: Callable[..., Any], inputs: Batch
    ) -> tuple[Batch, Mapping[str, Array], int]:
        """Returns the batch with an inference call's key, its results, and the bytes of parameters moved for it."""
        # A copy made for this call is dropped with this name, when the call no longer needs it.
        params, bytes_moved = self._params_for(mfc)
        results = program(params, inputs)
        (key,) = mfc.outputs
        return batch.with_arrays(**{key: results[mfc.head or key]}), results, bytes_moved

    def _params_for(self, mfc: MFC) -> tuple[Tree, int]:
        """Returns the role's parameters where the call needs them, and the bytes that had to move for it."""
        role, layout, params = self.roles[mfc.role], self.layouts[mfc.name], self.params(mfc.role)
        if layout == role.home and not role.is_offloaded:
            return params, 0
        shardings = tree_shardings(role.model.axes, role.model.abstract, inference_rules(layout.strategy), layout)
        copy, report = reshard(params, shardings, dtype=role.forward_options.precision.dtype)
        return copy, report.bytes_moved

    def _watch(self, mfc: MFC, results: Any, *, start: float, step: int, bytes_moved: int, num_tokens: int) -> None:
        role, layout = self.roles[mfc.role], self.layouts[mfc.name]
        # Forward 2 and backward 4 operations a parameter and token; attention's own share is left out.
        per_token = (6 if mfc.call == "train_step" else 2) * num_params(role.model.abstract)
        self.timeline.watch(
            results,
            start=start,
            step=step,
            name=mfc.name,
            devices=layout.device_names,
            num_tokens=num_tokens,
            num_flops=float(per_token * num_tokens),
            bytes_moved=bytes_moved,
            after=self._waits_for(mfc),
        )

    def _waits_for(self, mfc: MFC) -> tuple[str, ...]:
        """Returns the earlier calls of a step on whose results or devices a call has to wait."""
        order, devices = self.graph.order, {name: set(layout.devices) for name, layout in self.layouts.items()}
        return tuple(
            other.name
            for other in order[: order.index(mfc)]
            if self.graph.edges.has_edge(other.name, mfc.name) or devices[other.name] & devices[mfc.name]
        )

    def evaluate(self, evaluation: Evaluation, batch: Batch) -> LossSums:
        """Returns the loss sums of a held-out batch under the role's current parameters, on the role's home layout."""
        for mfc in evaluation.calls:
            inputs = self._place(batch, mfc)
            batch, _, _ = self._infer(batch, mfc, self._program(mfc, inputs), inputs)
        role = self.roles[evaluation.role]
        key = ("evaluate", evaluation.role, evaluation.loss)
        if key not in self._programs:
            options = replace(role.forward_options, max_segment_len=evaluation.loader.longest)
            fn = make_evaluation(role.model, evaluation.loss, role.home, options)
            self._programs[key] = Compiled("evaluate", fn, self.compile_log, out_shardings=role.home.replicated)
        inputs = put_batch(batch, inference_rules(role.home.strategy), role.home)
        return self._programs[key](self.params(evaluation.role), inputs)

    def params(self, role: str) -> Tree:
        """Returns the role's parameters as they stand now."""
        state = self.states[role]
        return state.params if isinstance(state, TrainState) else state

    def _program(self, mfc: MFC, inputs: Batch) -> Callable[..., Any]:
        num_mbs = num_micro_batches(mfc, inputs, self.layouts[mfc.name])
        key = (mfc.name, num_mbs)
        if key not in self._programs:
            make = self._make_train if mfc.call == "train_step" else self._make_inference
            self._programs[key] = make(mfc, num_mbs)
        return self._programs[key]

    def _make_train(self, mfc: MFC, num_mbs: int) -> Compiled:
        role, layout = self.roles[mfc.role], self.layouts[mfc.name]
        assert mfc.loss and role.optimizer and role.spec.optimizer, (
            f"{mfc.name}: a training call has a loss and an optimizer"
        )
        forward = replace(role.forward_options, max_segment_len=mfc.max_seqlen)
        options = TrainOptions(forward=forward, num_mbs=num_mbs)
        max_norm = role.spec.optimizer.gradient_clipping
        step = make_train_step(role.model, mfc.loss, role.optimizer, max_norm, layout, options)
        out = (train_state_shardings(role.model, role.optimizer, layout), layout.replicated)
        return Compiled(mfc.name, step, self.compile_log, donate_argnums=0, out_shardings=out)

    def _make_inference(self, mfc: MFC, num_mbs: int) -> Compiled:
        role, layout = self.roles[mfc.role], self.layouts[mfc.name]
        assert mfc.head, f"{mfc.name}: an inference call names the output it computes"
        options = replace(role.forward_options, max_segment_len=mfc.max_seqlen)
        fn = make_inference(role.model, mfc.head, layout, options, num_mbs)
        return Compiled(mfc.name, fn, self.compile_log)


def put_batch(batch: Batch, rules: Rules, layout: Layout) -> Batch:
    """Returns the batch on the layout's devices: host arrays are put there, other calls' results moved there."""
    results = {key: batch[key] for key in batch if isinstance(batch[key], Array)}
    fresh = place_batch(batch.select(set(batch) - set(results)), rules, layout)
    moved, _ = reshard(results, {key: layout.sharding("data") for key in results})
    return fresh.with_arrays(**moved)


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


def num_micro_batches(mfc: MFC, batch: Batch, layout: Layout) -> int:
    """Returns the number of micro-batches: as given, or the fewest that keep each under `max_tokens_per_mb` tokens.

    Raises ValueError when the rows do not divide, or one row per device is more than the budget.
    """
    rows_per_device, dp = batch.num_rows // layout.strategy.dp, layout.strategy.dp
    if mfc.max_tokens_per_mb is None:
        wanted = mfc.num_mbs or 1
        if rows_per_device % wanted:
            raise ValueError(
                f"{mfc.name}: {batch.num_rows} rows over dp={dp} leave {rows_per_device} a device, which "
                f"n_mbs={wanted} does not divide; use another n_mbs or batch size"
            )
        return wanted
    if mfc.max_tokens_per_mb < dp * batch.row_len:
        raise ValueError(
            f"{mfc.name}: max_tokens_per_mb={mfc.max_tokens_per_mb} is less than one row of {batch.row_len} tokens "
            f"on each of dp={dp} devices; set it to at least {dp * batch.row_len}"
        )
    least = math.ceil(batch.num_rows * batch.row_len / mfc.max_tokens_per_mb)
    return next(n for n in range(least, rows_per_device + 1) if rows_per_device % n == 0)
