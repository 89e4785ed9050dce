"""Runs a dataflow graph: take inputs, bring parameters to the call's layout, call, merge outputs."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import networkx as nx
from jax import Array

from realjax.allocation.plan import AllocationPlan
from realjax.core.axes import inference_rules
from realjax.core.batch import Batch
from realjax.core.loss import LossSums
from realjax.core.metrics import summarize
from realjax.core.progress import Progress
from realjax.core.trees import Tree, join_trees, map_paths
from realjax.dataflow.graph import Call, Host, Inference, ModelCall, Train
from realjax.dataflow.run import Evaluation, RunSpec
from realjax.dataflow.turns import Turns
from realjax.engine.compiled import CompileLog
from realjax.engine.state import TrainState
from realjax.record.timeline import Timeline
from realjax.reshard.apply import ema_update, reshard
from realjax.reshard.fetch import fetch
from realjax.runtime.bases import Bases
from realjax.runtime.beside import Beside
from realjax.runtime.calls import RUN, Done, Metrics, put_batch, read_arrays
from realjax.runtime.draws import FIRST, SAMPLING, GroupSampler
from realjax.runtime.flight import Row
from realjax.runtime.programs import Programs, num_micro_batches
from realjax.runtime.roles import Role
from realjax.runtime.sizes import Sizes
from realjax.runtime.threads import Span
from realjax.runtime.turns import Calls, make_calls

logger = logging.getLogger("realjax.executor")

Controls = dict[str, dict[str, float]]
ENVIRONMENT = "environment"  # in the timeline: some were asked, and had not answered


@dataclass(frozen=True)
class StepResult:
    """What a step leaves: the batch with all keys, and of each call its metrics, one dict for each update."""

    batch: Batch
    metrics: dict[str, Sequence[Metrics]]

    def numbers(self) -> dict[str, float]:
        """Returns the metrics, a call's of all its updates together, when they are there.

        A name that several calls have starts with its call's.
        """
        by_call = {call: _summarize_on_host(updates) for call, updates in self.metrics.items()}
        names = [name for values in by_call.values() for name in values]
        return {
            f"{call}/{name}" if names.count(name) > 1 else name: value
            for call, values in by_call.items()
            for name, value in values.items()
        }


def _summarize_on_host(updates: Sequence[Metrics]) -> dict[str, float]:
    on_devices = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(updates))
    return summarize(fetch(dict(update)) if on_devices else update for update in updates)


class Executor:
    """Holds what changes during a run, the roles' states and the host calls' controls, and the compiled calls."""

    def __init__(
        self,
        spec: RunSpec,
        plan: AllocationPlan,
        roles: Mapping[str, Role],
        states: dict[str, TrainState | Tree],
        controls: Mapping[str, Mapping[str, float]] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`controls` are the host calls' states by name where they are not those before the first step.

        `progress` is told of each call.

        Raises ValueError for a call that reads what one of the step before has made from what was before that.
        """
        self.graph, self.plan, self.roles, self.states = spec.graph, plan, roles, states
        self.averages, self.seed = spec.averages, spec.seed
        made, ahead = self.graph.producers, self.graph.ahead
        if late := [(call.name, key) for call in self.graph.calls for key in call.delays if made[key] not in ahead]:
            raise ValueError(
                f"executor: {late[0][0]} reads {late[0][1]} of the step before, which is not kept: {made[late[0][1]]} "
                "itself waits for a step before; take it from the same step"
            )
        host_calls = [call for call in self.graph.calls if isinstance(call, Host)]
        self.controls: Controls = {call.name: dict((controls or {}).get(call.name, call.state)) for call in host_calls}
        self.sampler = None if spec.sampling is None else GroupSampler(spec.sampling, spec.graph, spec.loader)
        if self.sampler is not None:
            self.controls[SAMPLING] = dict((controls or {}).get(SAMPLING, FIRST))
        self.bases = Bases(roles)
        self.programs, self.timeline = Programs(plan, roles, spec.seed), Timeline()
        self.progress = self.programs.log.progress = progress or Progress()
        self.progress.pending_fn = self.timeline.list_pending
        self.beside = Beside(self.timeline.now)
        self.rows: list[Row] = []  # drawn or begun for steps to come, see `runtime/ahead.py`
        self._environments: Calls | None = None
        self.sizes = Sizes()
        self._moved: set[str] = set()  # calls that make copies of parameters, the first of which has been logged
        self._copies: dict[str, Array] = {}  # by call: what is ready when it needs its copy of parameters no more

    def step(
        self, batch: Batch, step: int | None, calls: Sequence[Call] | None = None, draw: int | None = None
    ) -> StepResult:
        """Runs every call of the graph, or `calls`, once; the metrics of training calls are still on the devices.

        `step` None is an evaluation, which leaves no trace: not in the timeline, and not in what host calls carry from
        step to step. Roles that follow others do so after all calls of a step; after some of them, see
        `update_averages`.
        """
        metrics: dict[str, Sequence[Metrics]] = {}
        left = self.graph.order if calls is None else calls
        if calls is None and step is not None and self.sampler is not None:
            batch, metrics = self.sampler.draw(self, step)
            left = [call for call in left if call.name not in self.sampler.names]

        def keep(call: Call, done: Done) -> Batch:
            if done.metrics:
                metrics[call.name] = done.metrics
            return done.batch

        begun: list[Host] = []  # beside others, in this order
        for call in left:
            for one in [one for one in begun if set(one.outputs) & set(call.inputs)]:
                batch = keep(one, self._finish(one, batch, step))
                begun.remove(one)
            if isinstance(call, Host) and call.is_beside:
                batch = self._begin(call, batch, step)
                begun.append(call)
            else:
                batch = keep(call, self.run_call(call, batch, step, draw))
        for one in begun:
            batch = keep(one, self._finish(one, batch, step))
        if calls is None and step is not None:
            self.update_averages()
        return StepResult(batch, metrics)

    def _begin(self, call: Host, batch: Batch, step: int | None) -> Batch:
        """Starts a call that runs beside others; returns the batch, whose arrays that it reads are on the host."""
        self.progress.begin(call.name, step)
        arrays = read_arrays(batch, call)
        self.beside.begin(call, arrays, self.controls.get(call.name, call.state))
        return batch.replace_arrays(**arrays)

    def _finish(self, call: Host, batch: Batch, step: int | None) -> Done:
        """Waits for a call that was started, and adds its keys."""
        self.progress.begin(call.name, step)
        finished = self.beside.finish(call.name)
        if step is not None:
            self.timeline.add_host_call(call.name, step, finished.start, finished.end)
            if call.name in self.controls:
                self.controls[call.name] = dict(finished.result.state)
        return Done(batch=batch.with_arrays(**finished.result.arrays), metrics=[finished.result.metrics])

    def run_call(self, call: Call, batch: Batch, step: int | None, draw: int | None = None) -> Done:
        """Runs one call; `draw` stands for the step where a call of the same step is run several times."""
        start = self.timeline.now()
        self.progress.begin(call.name, step)
        done: Done = RUN[type(call)](self, call, batch, step if draw is None else draw)
        if isinstance(call, Inference) and call.name in self._moved:
            self._copies[call.name] = min(jax.tree.leaves(done.results), key=lambda x: x.size)
        spans = [] if self._environments is None else self._environments.take_spans()
        if step is not None and not isinstance(call, Host):
            self.watch(call, done, start, step)
            self.watch_environments(spans, step)
        return done

    def update_averages(self) -> None:
        """Brings the roles that follow others a step further; waits for what these are trained by."""
        for average in self.averages:
            self.states[average.role] = ema_update(self.params(average.role), self.params(average.source), average.eta)

    def environments(self, turns: Turns) -> Calls:
        """Returns the calls of environments. Every process must call this."""
        if self._environments is None:
            self._environments = make_calls(turns, now_fn=self.timeline.now)
        return self._environments

    def watch_environments(self, spans: Iterable[Span], step: int) -> None:
        """Has the timeline record from when to when environments were at work."""
        for start, end in spans:
            self.timeline.add_host_call(ENVIRONMENT, step, start, end)

    def evaluate(self, evaluation: Evaluation, batch: Batch) -> LossSums:
        """Returns the loss sums of a held-out batch that has been through the evaluation's calls, under the role's
        current parameters, on the role's home layout.
        """
        home = self.roles[evaluation.role].home
        inputs = put_batch(batch, inference_rules(home.strategy), home)
        program = self.programs.evaluation(evaluation, num_micro_batches(evaluation, inputs, home))
        return program(self.params(evaluation.role), inputs)

    def params(self, role: str) -> Tree:
        """Returns the role's parameters as they stand now."""
        own = self.own_params(role)
        return own if self.roles[role].spec.base is None else join_trees(self.bases.at_home(self.roles[role]), own)

    def own_params(self, role: str) -> Tree:
        """Returns those of the role's parameters that it shares with no other: with adapters these alone."""
        state = self.states[role]
        return state.params if isinstance(state, TrainState) else state

    def params_for(self, mfc: ModelCall, leaf_fn: Callable[[str, Array], Any] | None = None) -> tuple[Tree, int]:
        """Returns the role's parameters where the call needs them, and the bytes that had to move for it.

        `leaf_fn(path, array)` makes what stands for each of them, as they arrive.
        """
        role, params = self.roles[mfc.role], self.own_params(mfc.role)
        if role.spec.base is not None:
            return self._bring(mfc, params, leaf_fn)
        if (shardings := role.copy_shardings(self.plan.layouts[mfc.name])) is None:
            return params if leaf_fn is None else map_paths(leaf_fn, params), 0
        self._wait_for_copies(mfc)
        is_first = mfc.name not in self._moved
        if is_first:
            self._moved.add(mfc.name)
            jax.block_until_ready(params)  # so that the seconds logged are those of the move
        dtypes = role.model.copy_dtypes(role.compute.array_dtype)
        copy, report = reshard(params, shardings, dtype=dtypes, block=is_first, arrived_fn=leaf_fn)
        if is_first:
            source = "host memory" if role.is_offloaded else f"its home {role.home}"
            logger.info("%s: %s from %s: %s", mfc.name, mfc.role, source, report)
        return copy, report.bytes_moved

    def _wait_for_copies(self, mfc: ModelCall) -> None:
        """Waits for earlier calls that have copies on devices of this one, so that none ever holds two."""
        layouts = self.plan.layouts
        devices = set(layouts[mfc.name].devices)
        for name in [name for name in self._copies if devices & set(layouts[name].devices)]:
            jax.block_until_ready(self._copies.pop(name))

    def abstract_params_for(self, mfc: ModelCall) -> Tree:
        """Returns what `params_for` does, as shapes with shardings where a copy would be made."""
        role, params = self.roles[mfc.role], self.params(mfc.role)
        layout = self.plan.layouts[mfc.name]
        shardings = role.copy_shardings(layout)
        if shardings is None or (role.spec.base is not None and layout == role.home):
            return params
        dtypes = role.model.copy_dtypes(role.compute.array_dtype)
        copy = lambda x, place, dtype: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place)
        return jax.tree.map(copy, params, shardings, dtypes)

    def base_for(self, role: str) -> tuple[Tree, ...]:
        """Returns what a role's training is given beside its state and the batch: what its adapters lie beside."""
        return () if self.roles[role].spec.base is None else (self.bases.at_home(self.roles[role]),)

    def _bring(self, mfc: ModelCall, own: Tree, leaf_fn: Callable[[str, Array], Any] | None) -> tuple[Tree, int]:
        """As `params_for`, of a role with a base."""
        role, layout = self.roles[mfc.role], self.plan.layouts[mfc.name]
        if leaf_fn is None:
            return self.bases.bring(role, own, layout)
        if role.spec.merges_adapters:
            return self.bases.merge(role, own, layout, leaf_fn)
        return self.bases.prepare(role, own, layout, mfc.name, leaf_fn)

    @property
    def compile_log(self) -> CompileLog:
        """The programs compiled so far."""
        return self.programs.log

    def watch(self, mfc: ModelCall, done: Done, start: float, step: int) -> None:
        """Has the timeline record a call that began at `start`, when its results are there."""
        # Forward 2 and backward 4 operations a parameter and token, 2 for one that is not trained; attention's own
        # share is left out.
        model = self.roles[mfc.role].model
        backward = 2 * model.num_active_params + 2 * min(model.num_trained_params, model.num_active_params)
        per_token = 2 * model.num_active_params + (backward if isinstance(mfc, Train) else 0)
        self.timeline.watch(
            done.results,
            start=start,
            step=step,
            name=mfc.name,
            devices=self.plan.layouts[mfc.name].device_names,
            num_tokens=done.num_tokens,
            num_flops=float(per_token * done.num_tokens),
            bytes_moved=done.bytes_moved,
            peak_bytes=done.peak_bytes,
            per_round=done.per_round,
            after=self._waits_for(mfc),
        )

    def _waits_for(self, mfc: ModelCall) -> tuple[str, ...]:
        """Returns the earlier model calls of a step on whose results or devices a call has to wait."""
        before = self.graph.order[: self.graph.order.index(mfc)]
        layouts, sources = self.plan.layouts, nx.ancestors(self.graph.edges, mfc.name)
        others, devices = [call.name for call in before if not isinstance(call, Host)], set(layouts[mfc.name].devices)
        return tuple(name for name in others if name in sources or devices & set(layouts[name].devices))
