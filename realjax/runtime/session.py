"""One process's part of a run: what it does before the first step, after each, and after the last."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import jax
from rich.console import Console

from realjax.allocation.cluster import find_cluster
from realjax.allocation.plan import AllocationPlan
from realjax.core.batch import Batch
from realjax.core.processes import is_first, largest
from realjax.data.loader import Position
from realjax.dataflow.run import Evaluation, RolloutEvaluation, RunSpec, join_names
from realjax.engine.state import TrainState
from realjax.record.answers import AnswerWriter, make_lines
from realjax.record.console import ProgressDisplay, StepLine, label_values
from realjax.record.curves import MAIN_METRICS, metric_rank, sort_metrics
from realjax.record.forecast import Forecast
from realjax.record.metrics import MetricsWriter, replace_text
from realjax.record.timeline import measure_calls
from realjax.reshard.fetch import fetch
from realjax.runtime.checkpoint import RunCheckpointer, RunState
from realjax.runtime.evaluation import evaluate_loss, evaluate_rollouts
from realjax.runtime.executor import Executor, StepResult
from realjax.runtime.exports import Exports, checkpoint_name
from realjax.runtime.finite import nonfinite_leaves
from realjax.runtime.flight import flatten_rows
from realjax.runtime.machines import describe_machine, describe_move
from realjax.runtime.memory import measured_peak_bytes
from realjax.runtime.places import Places
from realjax.runtime.resume import empty_layers
from realjax.runtime.run_report import RunReport
from realjax.runtime.stop import FAILED, StopSignal, signal_name
from realjax.runtime.triggers import Trigger
from realjax.runtime.warm import compile_shapes

logger = logging.getLogger("realjax.loop")
CLUSTER_FILE = "cluster.json"  # of the log directory: the machine's description with this run's factors
MOST_SHOWN = 12  # metrics in a line; of more, the main ones, and all of them are in the record


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run writes: the states to continue from, and in the first process of several its record."""

    checkpointer: RunCheckpointer
    exports: Exports
    metrics: MetricsWriter | None
    answers: AnswerWriter | None
    console: Console | None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A step whose calls are made, and whose metrics have not been looked at."""

    step: int
    result: StepResult
    began: float
    has_compiled: bool


class Session:
    """One process's part of a run, from its first step to its last."""

    def __init__(
        self, spec: RunSpec, plan: AllocationPlan, executor: Executor, state: RunState, outputs: Outputs
    ) -> None:
        """`state` is that before the first step to take."""
        self.spec, self.plan, self.executor, self.outputs = spec, plan, executor, outputs
        self.first_step = state.step
        self.exports = outputs.exports
        self.rates: dict[str, float] = state.counters.get("rates", {})
        self.machine = describe_machine(plan, spec.allocation.num_devices)
        self.move = describe_move(state.counters.get("machine", {}), self.machine)
        self.saves = spec.benchmark_steps is None
        self.save_trigger, self.evaluate_trigger = Trigger(spec.save), Trigger(spec.evaluate)
        self.last_step = min(spec.loader.total_steps, state.step + (spec.benchmark_steps or spec.loader.total_steps))
        self.report = RunReport(spec, executor, range(state.step, self.last_step))
        self.num_compiled = 0
        self.step_start = self._last_end = 0.0
        self._next_batch: Batch | None = None
        # A step of one call has nothing for the host to do: its metrics wait until the next one is on the devices.
        self.looks_back = len(spec.graph.calls) == 1
        self._taken: Taken | None = None
        self.save_seconds = self.total_save_seconds = 0.0  # that the steps waited for
        self.fault: OSError | None = None  # what this process cannot go on with
        self.places = Places()
        for directory in (spec.paths.checkpoints, spec.paths.recover):
            self.places.keep(directory)
        self.display = ProgressDisplay(self.last_step, outputs.console, done_steps=state.step)

    def begin(self) -> None:
        """Says what is to come, and evaluates before the first step."""
        loader = self.plan.loader
        logger.info(
            "%d steps, starting after step %d; a batch of %s is %s rows x tokens, %.1f%% of it padding",
            loader.total_steps, self.first_step, "prompts" if self.plan.rollouts else "the data", loader.shapes,
            100 * loader.padding_share,
        )  # fmt: skip
        if self.move is not None:
            logger.info("%s", self.move)
        if not self.saves:
            logger.info("benchmark_steps: neither checkpoints nor training states are written")
        if self.first_step == 0:
            self.evaluate(0, self._due_evaluations(is_due=self.spec.evaluate.is_set, is_end=True))
        self.report.update()

    def begin_step(self, step: int) -> None:
        """Starts the step's clock, and compiles what is known to come."""
        self.executor.progress.begin("batch", step)
        self.step_start, self.num_compiled = time.perf_counter(), len(self.executor.compile_log.entries)
        if step == self.first_step + 1:
            compile_shapes(self.executor, self.plan.loader, range(step, self.last_step))

    def take_batch(self, step: int) -> Batch:
        """Returns the step's batch, which `prepare_batch` may have made."""
        batch, self._next_batch = self._next_batch, None
        return self.plan.loader.batch(step) if batch is None else batch

    def prepare_batch(self, step: int) -> None:
        """Makes the batch of the step that follows, if any, while the devices are at work."""
        if step < self.last_step:
            self.executor.progress.begin("batch", step)
            self._next_batch = self.plan.loader.batch(step)

    def finish_step(self, step: int, result: StepResult, stop: StopSignal) -> int | None:
        """Records the step, evaluates and saves where that is due; returns the exit code of a run that ends here.

        None: it goes on.
        """
        self._record_taken()
        has_compiled = len(self.executor.compile_log.entries) > self.num_compiled
        self._taken = Taken(step=step, result=result, began=self.step_start, has_compiled=has_compiled)
        position, is_last = self.plan.loader.position(step), step + 1 == self.last_step
        names = self._due_evaluations(is_due=self.evaluate_trigger.fires(position), is_end=is_last)
        if not self.looks_back or has_compiled or is_last or names:
            self._record_taken()
        self.outputs.checkpointer.settle()
        self.exports.writes.check()
        self.evaluate(step + 1, names)
        is_due = self.save_trigger.fires(position) or is_last
        if is_due:
            self._record_taken()
        # Asked once: a signal that comes later waits for the next step.
        code = largest(FAILED if self.fault else stop.code)
        if code:
            self._record_taken()
        if self.saves and (is_due or code):
            start = time.perf_counter()
            self.save(position, export=is_due)
            self.save_seconds = time.perf_counter() - start
            self.total_save_seconds += self.save_seconds
        if self.fault is not None:
            raise self.fault
        if not is_last:
            self.report.update()
        if code == FAILED:
            return 1  # the process that cannot go on says why
        if not code or is_last:
            return None
        name, where = signal_name(code), "from here" if self.saves else "from the last save"
        logger.warning("stopped by %s after step %d; recover_mode=auto continues %s", name, step + 1, where)
        return code

    def _record_taken(self) -> None:
        """Records the step that was taken last, unless that is done."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self.record(taken)

    def record(self, taken: Taken) -> None:
        """Waits for a step's metrics, and writes and logs them."""
        step, result, num_tokens = taken.step, taken.result, taken.result.batch.num_tokens
        self.executor.progress.begin("results", step)
        position, values = self.plan.loader.position(step), result.numbers()
        # Its devices were at the step before until that one's metrics came.
        began, self._last_end = max(taken.began, self._last_end), time.perf_counter()
        seconds = self._last_end - began
        self._refuse_nonfinite(values, step)
        self._watch_rates(step, values)
        values |= self._call_metrics(step)
        values |= {"tokens_per_second": num_tokens / seconds, "seconds": seconds, "save_seconds": self.save_seconds}
        self.save_seconds = 0.0
        values = sort_metrics(values)
        if not taken.has_compiled:
            self.report.time_step(seconds, num_tokens, values)
        if self.report.forecast is not None:
            values |= self.report.forecast.metrics()
        if self.outputs.answers is not None and self.spec.answers and self.spec.decode_fn:
            self.outputs.answers.append(make_lines(result.batch, self.spec.answers, self.spec.decode_fn))
        self._record(step + 1, {**values, "epoch": position.epoch}, kind="train")
        if self.outputs.metrics is not None:
            self.display.finish_step(self._step_line(position, values))
        self.report.show_answers(step + 1, result)

    def _record(self, step: int, values: Mapping[str, float], kind: str) -> None:
        """Writes metrics; where that fails the run ends too, but after the state of the step is saved."""
        try:
            if self.outputs.metrics is not None:
                self.outputs.metrics.write(step, values, kind)
        except OSError as error:
            self.fault = error

    def _call_metrics(self, step: int) -> dict[str, float]:
        """Returns what each call of the step took, and what the devices measured."""
        values = measure_calls(self.executor.timeline.of_step(step))
        measured = measured_peak_bytes(jax.local_devices())
        return values if measured is None else values | {"device_peak_mib": measured / 2**20}

    def _step_line(self, position: Position, values: dict[str, float]) -> StepLine:
        hidden = ("seconds", "save_seconds", "num_skipped")
        shown = _main_ones({name: value for name, value in values.items() if name not in hidden and "/" not in name})
        return StepLine(
            epoch=position.epoch,
            num_epochs=self.spec.num_epochs,
            epoch_step=position.epoch_step,
            steps_per_epoch=self.spec.loader.steps_per_epoch,
            global_step=position.global_step,
            seconds=values["seconds"],
            metrics=shown,
        )

    def _due_evaluations(self, *, is_due: bool, is_end: bool) -> list[str]:
        """Returns the sets to measure: those that the frequency says, and at both ends those that are for these."""
        evaluations = self.spec.evaluations.items()
        return [name for name, one in evaluations if (is_end if _is_for_ends(one) else is_due)]

    def evaluate(self, step: int, names: Iterable[str]) -> None:
        """Measures the held-out losses, or held-out answers, after `step` steps; the best actor so far is kept."""
        if not (names := list(names)):
            return
        self.executor.progress.begin("evaluation", step - 1)
        start = time.perf_counter()
        values: dict[str, float] = {}
        for name in names:
            evaluation, loader = self.spec.evaluations[name], self.plan.held_out[name]
            if isinstance(evaluation, RolloutEvaluation):
                found, samples = evaluate_rollouts(self.executor, evaluation, loader, self.spec.decode_fn)
                samples = [replace(one, variant=join_names(name, one.variant)) for one in samples]
                self.report.add_samples(step, samples)
            else:
                found = evaluate_loss(self.executor, evaluation, loader)
            values |= {join_names(name, metric): value for metric, value in found.items()}
        if values:
            self._record(step, values, kind="eval")
        text = label_values(_main_ones(values)) or f"{', '.join(names)} drawn"
        logger.info("evaluation after step %d: %s; it took %.1f s", step, text, time.perf_counter() - start)
        if (metric := self.spec.best_metric) is not None and metric in values and step > 0 and self.saves:
            role = self.exports.best_role
            self._refuse_nonfinite_state(role, step)
            self.exports.keep_best(self.executor.params(role), values[metric], step)

    def save(self, position: Position, *, export: bool) -> None:
        """Has every role that changes written as a HuggingFace checkpoint, when `export`, and the state to go on from.

        A run continues after the step of that state, so whatever else belongs to the step has to be there before it.
        """
        self.executor.progress.begin("save", position.global_step - 1)
        self.exports.writes.wait()  # the host holds the copies of one save at a time
        self.places.check()
        changed = {average.role for average in self.spec.averages}
        states = {
            name: state
            for name, state in self.executor.states.items()
            if isinstance(state, TrainState) or name in changed
        }
        for name in states:
            self._refuse_nonfinite_state(name, position.global_step)
        for name in states if export else ():
            self.exports.write(name, self.executor.params(name), checkpoint_name(position))
            self.places.keep(self.spec.paths.checkpoints / name)
        counters = {
            "identity": asdict(self.spec.identity),
            "controls": {name: dict(state) for name, state in self.executor.controls.items()},
            "sizes": self.executor.sizes.met,
            "best": self.exports.best,
            "rates": self.rates,
            "machine": self.machine,
            "stalled": self._stalled(),
        }
        state = RunState(
            step=position.global_step,
            roles=states,
            counters=counters,
            empty_layers=empty_layers(self.executor.roles, states),
            rollouts=flatten_rows(self.executor.rows),
        )
        self.outputs.checkpointer.save(state, self.exports.hold_best(), before_fn=self.exports.writes.make_barrier())

    def _stalled(self) -> dict[str, int]:
        """Returns how many updates in a row were skipped, of the roles whose last step brought no other."""
        states = {name: state for name, state in self.executor.states.items() if isinstance(state, TrainState)}
        skipped = {name: int(fetch(state.num_skipped)) for name, state in states.items()}
        return {name: n for name, n in skipped.items() if n >= self.spec.graph.num_updates(name)}

    def finish(self) -> int:
        """Writes the report and says where everything is, when the last save is complete; returns the exit code."""
        self.executor.progress.begin("last save")
        self.outputs.checkpointer.wait()
        self.exports.writes.wait()
        self.places.check()
        log = self.executor.compile_log
        logger.info("programs compiled: %d in %.1f s", len(log.entries), log.seconds)
        if num_timed := self.report.num_timed:
            mean = self.report.timed_seconds / num_timed
            logger.info("mean step time %.3f s over %d steps (steps that compiled left out)", mean, num_timed)
        if self.total_save_seconds:
            logger.info("the steps waited %.2f s for saves, which go on in the background", self.total_save_seconds)
        if self.report.forecast is not None:
            logger.info("%s", self.report.forecast.text())
            self._refine_cluster(self.report.forecast)
        if self.outputs.answers is not None:
            self.outputs.answers.finish()
            logger.info("answers: %s", self.outputs.answers.path)
        self.report.finish()
        return tell_stalled(self._stalled())

    def _refine_cluster(self, forecast: Forecast) -> None:
        """Writes the description of the cluster with the factors of the run; where asked for, into its own file too."""
        predicted, measured = self.plan.predicted, forecast.measured()
        if predicted is None or not measured or not is_first():
            return
        replace_text(self.spec.paths.logs / CLUSTER_FILE, predicted.refined_cluster(measured).to_json())
        planner = self.spec.allocation.planner
        if planner.update_cluster and planner.cluster is not None:
            # Of its own size, which the run's devices may be a part of.
            described = replace(find_cluster(planner.cluster), factors=predicted.refine(measured))
            replace_text(planner.cluster, described.to_json())
            logger.info("%s: factors of this run's measured steps were written", planner.cluster)

    def _watch_rates(self, step: int, values: Mapping[str, float]) -> None:
        """Says with which learning rates a run goes on, beside those that it left off with."""
        before, self.rates = self.rates, {n: v for n, v in values.items() if n.rsplit("/", 1)[-1] == "lr"}
        if step == self.first_step > 0:
            texts = (f"{name} {before[name]:.3g} -> {rate:.3g}" for name, rate in self.rates.items() if name in before)
            logger.info("learning rate of the last step before and of the first one now: %s", ", ".join(texts))

    def _refuse_nonfinite(self, values: dict[str, float], step: int) -> None:
        """Raises RuntimeError when too many updates in a row had gradients that were not finite."""
        for name, value in values.items():
            if name.rsplit("/", 1)[-1] != "num_skipped" or value == 0:
                continue
            logger.warning(
                "step %d: gradients are not finite, the update was skipped (%d in a row)", step + 1, int(value)
            )
            if value >= self.spec.max_nonfinite_steps:
                raise RuntimeError(
                    f"step {step + 1}: gradients were not finite {int(value)} times in a row (max_nonfinite_steps); "
                    f"{self._kept()}; lower the learning rate or look at the data"
                )

    def _refuse_nonfinite_state(self, name: str, step: int) -> None:
        """Raises RuntimeError rather than have numbers saved or exported that are not finite."""
        leaves = jax.tree_util.tree_leaves_with_path(self.executor.states[name])
        named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        if broken := nonfinite_leaves(named, self.executor.roles[name].home):
            raise RuntimeError(
                f"step {step}: {name} holds numbers that are not finite, in {broken[0]}, so it is not saved; "
                f"{self._kept()}; lower the learning rate or look at the data"
            )

    def _kept(self) -> str:
        self.outputs.checkpointer.wait()  # what is still being written counts
        saved = self.outputs.checkpointer.latest_step
        return "nothing was saved before" if saved is None else f"step {saved} is in {self.spec.paths.recover}"


def _main_ones(values: dict[str, float]) -> dict[str, float]:
    """Returns the metrics of a line, the most telling first; the others are in the record."""
    values = sort_metrics(values)
    is_main = lambda name: len(values) <= MOST_SHOWN or metric_rank(name) < len(MAIN_METRICS)
    return {name: value for name, value in values.items() if is_main(name)}


def _is_for_ends(evaluation: Evaluation | RolloutEvaluation) -> bool:
    return isinstance(evaluation, RolloutEvaluation) and evaluation.is_for_ends


def tell_stalled(stalled: Mapping[str, int]) -> int:
    """Returns the exit code of a run at its end: 1, with a line, when roles took no update in the last step."""
    for name, num_skipped in stalled.items():
        logger.error(
            "%s: the last %d updates were skipped, as their gradients were not finite, so the run did not end as it "
            "should; look at the data, or lower the learning rate",
            name, num_skipped,
        )  # fmt: skip
    return 1 if stalled else 0
