"""The compiled programs of a graph's calls: made when a call first runs, and kept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from realjax.allocation.plan import AllocationPlan
from realjax.core.batch import Batch
from realjax.core.layout import Layout
from realjax.dataflow.graph import Generate, Inference, Train
from realjax.dataflow.run import Evaluation
from realjax.engine.compiled import Compiled, CompileLog
from realjax.engine.inference import make_evaluation, make_inference
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.engine.state import train_state_shardings
from realjax.engine.tail import Tail
from realjax.engine.train import TrainOptions, make_train_step
from realjax.reshard.apply import Arrays, reshard
from realjax.runtime.roles import Role


class Programs:
    """One program for each call and number of micro-batches; each compiles once for every shape of batch it meets."""

    def __init__(self, plan: AllocationPlan, roles: Mapping[str, Role], seed: int) -> None:
        self.plan, self.roles, self.seed, self.log = plan, roles, seed, CompileLog()
        self._compiled: dict[tuple[str, int], Compiled] = {}
        self._slots: dict[str, SlotPrograms] = {}
        self._tails: dict[str, Tail] = {}

    def train_step(self, mfc: Train, num_mbs: int) -> Compiled:
        """Returns `step(state, batch) -> (state, metrics)`, the state donated."""
        return self._get(mfc.name, num_mbs, lambda: self._make_train_step(mfc, num_mbs))

    def inference(self, mfc: Inference, num_mbs: int) -> Compiled:
        """Returns `fn(params, batch) -> outputs` of the call's head."""
        return self._get(mfc.name, num_mbs, lambda: self._make_inference(mfc, num_mbs))

    def evaluation(self, evaluation: Evaluation, num_mbs: int) -> Compiled:
        """Returns `fn(params, batch) -> sums` of a held-out loss on the role's home layout."""
        # Sets that differ in their longest sequence have programs of their own: attention looks no further back.
        name = f"{evaluation.name}, up to {evaluation.loader.longest} tokens"
        return self._get(name, num_mbs, lambda: self._make_evaluation(evaluation, num_mbs))

    def slots(self, mfc: Generate) -> SlotPrograms:
        """Returns the programs of a generate call."""
        if mfc.name not in self._slots:
            layout, num_slots = self.plan.layouts[mfc.name], self.plan.rollouts[mfc.name].num_slots
            self._slots[mfc.name] = self._make_slots(mfc, layout, num_slots)
        return self._slots[mfc.name]

    def tail(self, mfc: Generate) -> Tail | None:
        """Returns where the last rows of a generate call go on; None where they stay."""
        if mfc.name not in self._tails and (shape := self.plan.rollouts[mfc.name].tail) is not None:
            programs = self._make_slots(mfc, shape.layout, shape.num_slots)
            self._tails[mfc.name] = Tail(self.slots(mfc), programs, _move)
        return self._tails.get(mfc.name)

    def _get(self, name: str, num_mbs: int, make: Callable[[], Compiled]) -> Compiled:
        if (name, num_mbs) not in self._compiled:
            self._compiled[name, num_mbs] = make()
        return self._compiled[name, num_mbs]

    def _make_train_step(self, mfc: Train, num_mbs: int) -> Compiled:
        role, layout = self.roles[mfc.role], self.plan.layouts[mfc.name]
        assert role.optimizer, f"{mfc.name}: a trained role has an optimizer"
        compute = replace(role.compute, max_segment_len=mfc.max_seqlen)
        options = TrainOptions(compute=compute, num_mbs=num_mbs, term_coefs=role.spec.term_coefs)
        step = make_train_step(role.model, mfc.loss, role.optimizer, layout, options)
        out = (train_state_shardings(role.model, role.optimizer, layout), layout.replicated)
        return Compiled(mfc.name, step, self.log, donate_argnums=0, out_shardings=out)

    def _make_inference(self, mfc: Inference, num_mbs: int) -> Compiled:
        role, layout = self.roles[mfc.role], self.plan.layouts[mfc.name]
        compute = replace(role.compute, max_segment_len=mfc.max_seqlen)
        fn = make_inference(role.model, mfc.head, layout, compute, num_mbs, mfc.draw, mfc.num_choices)
        return Compiled(mfc.name, fn, self.log)

    def _make_slots(self, mfc: Generate, layout: Layout, num_slots: int) -> SlotPrograms:
        role = self.roles[mfc.role]
        sampler = Sampler(config=mfc.config, eos_ids=mfc.eos_ids, seed=self.seed, num_tokens=mfc.num_tokens)
        log, records = self.log.of(mfc.name), {"records_routes": mfc.records_routes}
        return SlotPrograms(role.generator, layout, sampler, num_slots, role.compute, log, **records)

    def _make_evaluation(self, evaluation: Evaluation, num_mbs: int) -> Compiled:
        role = self.roles[evaluation.role]
        compute = replace(role.compute, max_segment_len=evaluation.loader.longest)
        fn = make_evaluation(role.model, evaluation.loss, role.home, compute, num_mbs)
        return Compiled("evaluate", fn, self.log, out_shardings=role.home.replicated)


def _move(tree: Arrays, places: Arrays, free_source: bool) -> tuple[Arrays, int]:
    moved, report = reshard(tree, places, free_source=free_source)
    return moved, report.bytes_moved


def num_micro_batches(call: Inference | Train | Evaluation, batch: Batch, layout: Layout) -> int:
    """Returns the number of micro-batches: as given, or the fewest that keep each under `max_tokens_per_mb` tokens.

    Raises ValueError when the rows do not divide, or one row per device is more than the budget.
    """
    rows_per_device, dp = batch.num_rows // layout.strategy.dp, layout.strategy.dp
    if (most := call.micro_batches.max_tokens) is None:
        wanted = call.micro_batches.count or 1
        if rows_per_device % wanted:
            raise ValueError(
                f"{call.name}: {batch.num_rows} rows over dp={dp} leave {rows_per_device} a device, which "
                f"n_mbs={wanted} does not divide; use another n_mbs or batch size"
            )
        return wanted
    if most < dp * batch.row_len:
        raise ValueError(
            f"{call.name}: max_tokens_per_mb={most} is less than one row of {batch.row_len} tokens "
            f"on each of dp={dp} devices; set it to at least {dp * batch.row_len}"
        )
    least = math.ceil(batch.num_rows * batch.row_len / most)
    return next(n for n in range(least, rows_per_device + 1) if rows_per_device % n == 0)
