"""Generation beside training: while a step trains on the answers that are there, those of the next step are drawn.

A step takes its batch from what was prepared before, brings the generator the parameters as they are, sends off the
training, and only then waits for tokens. So a batch was drawn by the parameters one update of the step before its own.
Where rows may be begun several steps ahead, later steps' prompts fill the slots that the next step's leave; what is not
finished when the next step's answers are, is interrupted, and goes on under the next parameters.

Processes without a device of the generator do not follow it: they get its rows when they are done. All else is
dispatched in the same order by all of them, which follows from the graph alone.
"""

import logging
import pickle
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realjax.core.batch import Batch
from realjax.core.metrics import Mean
from realjax.core.processes import Mailbox
from realjax.core.trees import Tree
from realjax.data.loader import Loader
from realjax.dataflow.graph import Generate
from realjax.engine.batching import Batcher
from realjax.engine.slot_arrays import Chunk
from realjax.runtime.calls import Done, find_peak_bytes, find_slots_bytes
from realjax.runtime.executor import Executor, StepResult
from realjax.runtime.finite import refuse_nonfinite
from realjax.runtime.flight import Row, dump_rows, load_rows
from realjax.runtime.rollouts import make_requests, pack_rollout
from realjax.runtime.turns import Talks, complete, make_calls

logger = logging.getLogger("realjax.ahead")


class Ahead:
    """The steps of a graph in which some calls work for the next step. The executor has the rows in flight."""

    def __init__(self, executor: Executor, loader: Loader, last_step: int) -> None:
        """`last_step` is the number of steps after which the run ends: nothing is drawn for later ones.

        Every process must make it. Raises ValueError where not exactly one of the calls is a generate call.
        """
        graph = executor.graph
        self.executor, self.loader, self.last_step = executor, loader, last_step
        ahead = [call for call in graph.order if call.name in graph.ahead]
        generators = [call for call in ahead if isinstance(call, Generate)]
        if len(generators) != 1:
            raise ValueError(
                f"executor: {len(generators)} of the calls that work for the next step ({', '.join(graph.ahead)}) "
                "generate; there must be one"
            )
        (self.mfc,) = generators
        self.judges = [call for call in ahead if call is not self.mfc]
        self.trainers = [call for call in graph.order if call.name not in graph.ahead]
        self.ready: StepResult | None = None  # the next step's batch, judged
        layout = executor.plan.layouts[self.mfc.name]
        self._owners = sorted({device.process_index for device in layout.devices})
        self._mailbox = Mailbox("rows") if len(self._owners) < jax.process_count() else None
        # Conversations of rows that are begun ahead go on from draw to draw.
        turns, source = self.mfc.turns, self._owners[0]
        self._environments = None if turns is None else make_calls(turns, source, executor.timeline.now)
        self._talks = None
        if turns is not None and self._environments is not None:
            self._talks = Talks(turns, executor.seed, self._environments)
        others = {
            device for call in graph.mfcs if call.name not in graph.ahead
            for device in executor.plan.layouts[call.name].devices
        }  # fmt: skip
        self._is_apart = not others & set(layout.devices)
        if not self._is_apart:
            logger.warning(
                "staleness: %s shares devices with training, so that one waits for the other; give them devices of "
                "their own: allocation_mode=heuristic, search, or a device_mesh each",
                self.mfc.name,
            )

    def step(self, step: int) -> StepResult:
        """Trains on the batch of the step, and prepares that of the next one beside it."""
        executor, is_last = self.executor, step + 1 >= self.last_step
        if self.ready is None:
            # Nobody has drawn for the first step of a run, and one that continues has the rows.
            if not self._has_rows(step):
                self._draw(step, self._bring_params(), version=step, last_begun=step + self.mfc.num_ahead - 1)
            self.ready = self._judge(step, now=step)
        judged = self.ready
        executor.rows = [row for row in executor.rows if row.step > step]
        brought = None if is_last else self._bring_params()  # while they are there: training takes their place
        trained = executor.step(judged.batch, step, self.trainers)
        self.ready = None
        if brought is not None:
            self._draw(step + 1, brought, version=step, last_begun=step + self.mfc.num_ahead)
            self.ready = self._judge(step + 1, now=step)
        executor.update_averages()
        return StepResult(trained.batch, {**judged.metrics, **trained.metrics})

    def _has_rows(self, step: int) -> bool:
        rows = [row for row in self.executor.rows if row.step == step]
        return bool(rows) and all(row.generation is not None for row in rows)

    @property
    def _is_owner(self) -> bool:
        return jax.process_index() in self._owners

    def _bring_params(self) -> tuple[Tree | None, int]:
        """Returns the generator's own copy of the parameters as they are, and the bytes that moved for it.

        None in processes without a device of it, which take part in the move. Every process must call this.
        """
        slots = self.executor.programs.slots(self.mfc)

        def make_own(path: str, leaf: Array) -> Array | list[Array] | None:
            if not self._is_owner:
                return None
            ready = slots.prepare_leaf(path, leaf)
            # Training gives its buffers up, and on its devices a copy may share them.
            return ready if self._is_apart else jax.tree.map(jnp.copy, ready)

        leaves, bytes_moved = self.executor.params_for(self.mfc, make_own)
        return slots.join(leaves) if self._is_owner else None, bytes_moved

    def _draw(self, target: int, brought: tuple[Tree | None, int], version: int, last_begun: int) -> None:
        """Finishes the rows of the step `target` under parameters of a version, beside others up to `last_begun`."""
        executor, start = self.executor, self.executor.timeline.now()
        executor.progress.begin(self.mfc.name, version)
        (params, bytes_moved), peak_bytes, per_round = brought, 0, Mean(0, 0)
        self._add_prompts(target, min(last_begun, self.last_step - 1))
        begun = [row for row in executor.rows if row.generation is None]
        rows = begun
        if params is not None:
            batcher, programs = self._make_batcher(params), executor.programs
            rows, per_round = self._continue_rows(begun, target, batcher, version), batcher.per_round
            slots_bytes = find_slots_bytes(programs.slots(self.mfc), programs.tail(self.mfc), params)
            peak_bytes = find_peak_bytes(executor, self.mfc, params, slots_bytes)
        spans = [] if self._environments is None else self._environments.take_spans()
        if self._mailbox is not None:
            source = self._owners[0]
            found = (dump_rows(rows), spans, per_round)
            message = pickle.dumps(found) if jax.process_index() == source else None
            dumped, spans, per_round = pickle.loads(self._mailbox.send(message, source))
            rows = load_rows(dumped)
        now = iter(rows)
        executor.rows = [next(now) if row.generation is None else row for row in executor.rows]
        num_tokens = sum(_count_tokens(after, before) for before, after in zip(begun, rows, strict=True))
        # Its rows are packed later: the record goes by its costs alone.
        none = Batch(arrays={})
        costs = {"bytes_moved": bytes_moved, "peak_bytes": peak_bytes, "per_round": per_round}
        done = Done(batch=none, num_tokens=num_tokens, **costs)
        executor.watch(self.mfc, done, start, version)
        executor.watch_environments(spans, version)

    def _add_prompts(self, target: int, last: int) -> None:
        """Adds the rows of the steps up to `last` that are not there."""
        there = [row.step for row in self.executor.rows]
        for step in range(max([target - 1, *there]) + 1, last + 1):
            requests = make_requests(self.loader.batch(step), self.mfc, step)
            self.executor.rows += [Row(step=step, request=request) for request in requests]

    def _make_batcher(self, params: Tree) -> Batcher:
        slots = self.executor.programs.slots(self.mfc)
        # Rows that wait for an environment come back: none of a conversation is the last.
        tail = None if self._talks is not None else self.executor.programs.tail(self.mfc)
        return Batcher(slots, params, stop_fn=self.mfc.stop_fn, fetch_fn=_read, tail=tail)

    def _continue_rows(self, rows: Sequence[Row], target: int, batcher: Batcher, version: int) -> list[Row]:
        """Returns the rows, of which those up to the step `target` are finished."""
        if self._talks is not None:
            num_rows = sum(row.step == target for row in self.executor.rows)
            return continue_talks(self._talks, batcher, rows, target, version, num_rows)
        numbers = batcher.submit(row.request for row in rows)
        due = {number for number, row in zip(numbers, rows, strict=True) if row.step <= target}
        found = {}
        while not due <= found.keys():
            batcher.poll()
            found |= batcher.results()
        taken = batcher.take_out(numbers)
        found |= batcher.results()
        return [
            row.finished(found[number], version) if number in found else row.interrupted(taken[number], version)
            for number, row in zip(numbers, rows, strict=True)
        ]

    def _judge(self, step: int, now: int) -> StepResult:
        """Returns the batch of a step, packed and with the keys of those that judge it, which run in the step `now`."""
        executor, rows = self.executor, [row for row in self.executor.rows if row.step == step]
        generations = [row.generation for row in rows if row.generation is not None]
        refuse_nonfinite(generations, f"{self.mfc.name}: {executor.roles[self.mfc.role].spec.title}")
        shape, requests = executor.plan.rollouts[self.mfc.name], [row.request for row in rows]
        ages, sizes = [row.ages for row in rows], executor.sizes.of(self.mfc.name)
        extras = None if self._talks is None else [row.dialogue.arrays() for row in rows if row.dialogue is not None]
        batch: Batch = pack_rollout(requests, generations, self.mfc, shape, ages, sizes, extras)
        return executor.step(batch, now, self.judges)


def continue_talks(
    talks: Talks, batcher: Batcher, rows: Sequence[Row], target: int, version: int, num_rows: int
) -> list[Row]:
    """Returns rows of conversations, of which those up to the step `target` are at their ends; `num_rows` it has."""
    for row in rows:
        if row.key not in talks:  # a new one, or one of before the run was continued
            talks.add(row.key, row.request, row.dialogue)
    found = talks.run(batcher, {row.key for row in rows if row.step <= target}, num_rows)
    so_far = lambda row: complete(batcher, found[row.key]) if row.key in found else talks.so_far(row.key)
    return [row.told(so_far(row), version) for row in rows]


def _read(chunk: Chunk[Array]) -> Chunk[np.ndarray]:
    """Returns what is whole on each of a layout's devices, of which this process has one."""
    return jax.tree.map(np.asarray, chunk)


def _count_tokens(after: Row, before: Row) -> int:
    """Returns the tokens that went through the model for a row: new ones, and those put in before them."""
    num_after, num_before = (0 if row.answer is None else len(row.answer.tokens) for row in (after, before))
    return num_after + len(after.request.tokens) if num_after > num_before else 0
