"""The compiled programs of a graph's calls: made when a call first runs, and kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from realjax.core.batch import Batch
from realjax.core.layout import Layout
from realjax.dataflow.graph import MFC
from realjax.dataflow.run import Evaluation
from realjax.engine.compiled import Compiled, CompileLog
from realjax.engine.inference import make_evaluation, make_inference
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.engine.state import train_state_shardings
from realjax.engine.train import TrainOptions, make_train_step
from realjax.runtime.roles import Role


class Programs:
    """One program for each call and number of micro-batches; each compiles once for every shape of batch it meets."""

    def __init__(self, seed: int = 0) -> None:
        self.log, self.seed = CompileLog(), seed
        self._made: dict[Any, Any] = {}

    def train_step(self, mfc: MFC, role: Role, layout: Layout, num_mbs: int) -> Compiled:
        """Returns `step(state, batch) -> (state, metrics)`, the state donated."""
        return self._get((mfc.name, num_mbs), lambda: self._make_train_step(mfc, role, layout, num_mbs))

    def inference(self, mfc: MFC, role: Role, layout: Layout, num_mbs: int) -> Compiled:
        """Returns `fn(params, batch) -> outputs` of the call's head."""
        return self._get((mfc.name, num_mbs), lambda: self._make_inference(mfc, role, layout, num_mbs))

    def slots(self, mfc: MFC, role: Role, layout: Layout, num_slots: int) -> SlotPrograms:
        """Returns the programs of a generate call; the number of slots is that of its first batch."""
        return self._get(mfc.name, lambda: self._make_slots(mfc, role, layout, num_slots))

    def evaluation(self, evaluation: Evaluation, role: Role, num_mbs: int) -> Compiled:
        """Returns `fn(params, batch) -> sums` of a held-out loss on the role's home layout."""
        return self._get(
            ("evaluate", evaluation.role, num_mbs), lambda: self._make_evaluation(evaluation, role, num_mbs)
        )

    def _get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _make_train_step(self, mfc: MFC, role: Role, layout: Layout, num_mbs: int) -> Compiled:
        assert mfc.loss and role.optimizer and role.spec.optimizer, (
            f"{mfc.name}: a training call has a loss and an optimizer"
        )
        forward = replace(role.forward_options, max_segment_len=mfc.max_seqlen)
        options = TrainOptions(forward=forward, num_mbs=num_mbs)
        max_norm = role.spec.optimizer.gradient_clipping
        step = make_train_step(role.model, mfc.loss, role.optimizer, max_norm, layout, options)
        out = (train_state_shardings(role.model, role.optimizer, layout), layout.replicated)
        return Compiled(mfc.name, step, self.log, donate_argnums=0, out_shardings=out)

    def _make_inference(self, mfc: MFC, role: Role, layout: Layout, num_mbs: int) -> Compiled:
        assert mfc.head, f"{mfc.name}: an inference call names the output it computes"
        options = replace(role.forward_options, max_segment_len=mfc.max_seqlen)
        fn = make_inference(role.model, mfc.head, layout, options, num_mbs, draw=mfc.draw)
        return Compiled(mfc.name, fn, self.log)

    def _make_slots(self, mfc: MFC, role: Role, layout: Layout, num_slots: int) -> SlotPrograms:
        assert (sampling := mfc.sampling) is not None, f"{mfc.name}: a generate call says how it samples"
        sampler = Sampler(
            config=sampling.config, eos_ids=sampling.eos_ids, seed=self.seed, num_tokens=sampling.num_tokens
        )
        return SlotPrograms(role.model, layout, sampler, num_slots, role.forward_options, self.log)

    def _make_evaluation(self, evaluation: Evaluation, role: Role, num_mbs: int) -> Compiled:
        options = replace(role.forward_options, max_segment_len=evaluation.loader.longest)
        fn = make_evaluation(role.model, evaluation.loss, role.home, options, num_mbs)
        return Compiled("evaluate", fn, self.log, out_shardings=role.home.replicated)


def row_multiple(calls: Sequence[tuple[MFC, Layout]]) -> int:
    """Returns what a batch's rows must be a multiple of, to divide over every call's devices and micro-batches."""
    return math.lcm(*(layout.strategy.row_multiple * (mfc.num_mbs or 1) for mfc, layout in calls))


def num_micro_batches(call: MFC | Evaluation, batch: Batch, layout: Layout) -> int:
    """Returns the number of micro-batches: as given, or the fewest that keep each under `max_tokens_per_mb` tokens.

    Raises ValueError when the rows do not divide, or one row per device is more than the budget.
    """
    rows_per_device, dp = batch.num_rows // layout.strategy.dp, layout.strategy.dp
    if call.max_tokens_per_mb is None:
        wanted = call.num_mbs or 1
        if rows_per_device % wanted:
            raise ValueError(
                f"{call.name}: {batch.num_rows} rows over dp={dp} leave {rows_per_device} a device, which "
                f"n_mbs={wanted} does not divide; use another n_mbs or batch size"
            )
        return wanted
    if call.max_tokens_per_mb < dp * batch.row_len:
        raise ValueError(
            f"{call.name}: max_tokens_per_mb={call.max_tokens_per_mb} is less than one row of {batch.row_len} tokens "
            f"on each of dp={dp} devices; set it to at least {dp * batch.row_len}"
        )
    least = math.ceil(batch.num_rows * batch.row_len / call.max_tokens_per_mb)
    return next(n for n in range(least, rows_per_device + 1) if rows_per_device % n == 0)
