"""The run: restore or load, step, log, evaluate, save, report."""

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
from rich.console import Console

from realjax.allocation.plan import make_plan
from realjax.core.metrics import summarize
from realjax.data.loader import Position
from realjax.dataflow.picture import describe_graph, draw_graph
from realjax.dataflow.run import RolloutEvaluation, RunSpec
from realjax.engine.state import TrainState
from realjax.hf.save import save_hf
from realjax.runtime.checkpoint import RunCheckpointer, RunState
from realjax.runtime.console import ProgressDisplay, StepLine, format_seconds
from realjax.runtime.evaluation import Sample, evaluate_loss, evaluate_rollouts
from realjax.runtime.executor import Executor, Metrics
from realjax.runtime.memory import measured_peak_bytes
from realjax.runtime.metrics import MetricsWriter
from realjax.runtime.processes import any_process, fetch, is_first
from realjax.runtime.report import MAIN_METRICS, REPORT_FILE, Section, write_report
from realjax.runtime.roles import Role, build_role, load_role
from realjax.runtime.rundir import open_run_directory, write_log
from realjax.runtime.triggers import STOPPED, StopSignal, Trigger

logger = logging.getLogger("realjax.loop")
MOST_SHOWN = 12  # metrics in a line; of more, the main ones, and all of them are in the record


def run(spec: RunSpec, console: Console | None = None) -> int:
    """Carries out a run and returns its exit code: 0 when it finished, 143 when SIGTERM stopped it after a save."""
    total_steps = spec.loader.total_steps
    plan = make_plan(spec.graph, spec.layouts, {name: role.offload for name, role in spec.roles.items()})
    logger.info("calls:\n%s", describe_graph(spec.graph))
    logger.info("allocation:\n%s", plan.describe())
    roles = {
        name: build_role(
            role, plan.homes[name], total_steps * spec.graph.num_updates(name), is_offloaded=name in plan.offloaded
        )
        for name, role in spec.roles.items()
    }
    # After what may refuse the run, which then leaves an earlier one's files where they are.
    has_state = open_run_directory(spec)
    with write_log(spec.paths.logs), RunCheckpointer(spec.paths.recover, spec.max_recover_saves) as checkpointer:
        if has_state and (checkpointer.latest_step or 0) >= total_steps and (spec.paths.logs / REPORT_FILE).exists():
            logger.info("all %d steps were done before, see %s", total_steps, spec.paths.logs / REPORT_FILE)
            return 0
        state = _first_state(spec, roles, checkpointer if has_state else None)
        controls = state.counters.get("controls", {})
        executor = Executor(
            spec.graph, spec.layouts, roles, dict(state.roles),
            seed=spec.seed, controls=controls, averages=spec.averages,
        )  # fmt: skip
        with _open_metrics(spec, state.step) as metrics, StopSignal() as stop:
            session = Session(spec, roles, executor, checkpointer, metrics, state, console)
            return session.run(stop)


def _open_metrics(spec: RunSpec, step: int) -> AbstractContextManager[MetricsWriter | None]:
    """Returns the writer in the first process, None in the others: a run has one record."""
    return MetricsWriter(spec.paths.logs, spec.wandb_mode, resume_step=step) if is_first() else nullcontext()


def _first_state(spec: RunSpec, roles: dict[str, Role], checkpointer: RunCheckpointer | None) -> RunState:
    """Returns the last complete save when there is one to continue from, else the state at step 0."""
    changing = {name: role for name, role in roles.items() if role.optimizer is not None or role.spec.is_averaged}
    if checkpointer is None or checkpointer.latest_step is None:
        return RunState(step=0, roles={name: load_role(role, spec.seed) for name, role in roles.items()})
    state = checkpointer.restore(
        {name: role.abstract_state() for name, role in changing.items()}, _empty_layers(roles, changing)
    )
    for name, value in _counters(spec).items():
        if state.counters.get(name) != value:
            raise ValueError(
                f"recover: the save in {spec.paths.recover} was made with another {name}, so the samples to come would "
                f"not be those that it left: continue with the same {name}, or use another trial_name"
            )
    fixed = {name: load_role(role, spec.seed) for name, role in roles.items() if name not in changing}
    return dataclasses.replace(state, roles={**fixed, **state.roles})


class Session:
    """One process's part of a run, from its first step to its last."""

    def __init__(
        self,
        spec: RunSpec,
        roles: dict[str, Role],
        executor: Executor,
        checkpointer: RunCheckpointer,
        metrics: MetricsWriter | None,
        state: RunState,
        console: Console | None,
    ) -> None:
        self.spec, self.roles, self.executor = spec, roles, executor
        self.checkpointer, self.metrics = checkpointer, metrics
        first_step = state.step
        self.first_step, self.started = first_step, time.monotonic()
        self.best: float | None = state.counters.get("best")
        self.samples: dict[int, list[Sample]] = {}  # by the step after which they were taken
        self.last_step = min(spec.loader.total_steps, first_step + (spec.benchmark_steps or spec.loader.total_steps))
        self.step_seconds: list[float] = []
        self.num_tokens = 0
        self.display = ProgressDisplay(self.last_step, console, done_steps=first_step)

    def run(self, stop: StopSignal) -> int:
        """Takes the remaining steps, then saves and reports."""
        spec, save, evaluate = self.spec, Trigger(self.spec.save), Trigger(self.spec.evaluate)
        _log_start(spec, self.first_step)
        if spec.evaluation and spec.evaluate.is_set and self.first_step == 0:
            self.evaluate(0)
        with self.display:
            for step in range(self.first_step, self.last_step):
                position = self.train(step)
                if spec.evaluation and evaluate.fires(position):
                    self.evaluate(step + 1)
                is_last = step + 1 == self.last_step
                is_due = save.fires(position) or is_last
                # Asked once: a signal that comes later waits for the next step.
                must_stop = any_process(stop.received)
                if is_due or must_stop:
                    self.save(position, export=is_due)
                if must_stop and not is_last:
                    logger.warning("stopped by SIGTERM after step %d; recover_mode=auto continues from here", step + 1)
                    return STOPPED
        self.finish()
        return 0

    def train(self, step: int) -> Position:
        """Takes one step and logs it."""
        start = time.perf_counter()
        batch, position = self.spec.loader.batch(step), self.spec.loader.position(step)
        num_compiled = len(self.executor.compile_log.entries)
        result = self.executor.step(batch, step)
        values = _merge({call: _numbers(updates) for call, updates in result.metrics.items()})
        num_tokens = result.batch.num_tokens
        seconds = time.perf_counter() - start
        self._refuse_nonfinite(values, step)
        values |= self._call_metrics(step)
        values |= {"tokens_per_second": num_tokens / seconds, "seconds": seconds}
        values = {name: values[name] for name in sorted(values, key=_rank)}
        if len(self.executor.compile_log.entries) == num_compiled:
            self.step_seconds.append(seconds)
            self.num_tokens += num_tokens
        if self.metrics is not None:
            self.metrics.write(step + 1, {**values, "epoch": position.epoch})
            self.display.finish_step(self._step_line(position, values))
        return position

    def _call_metrics(self, step: int) -> dict[str, float]:
        """Returns what each call of the step took (`CallRecord.metrics`), and what the devices measured."""
        records = self.executor.timeline.of_step(step)
        values = {f"{name}/{record.name}": value for record in records for name, value in record.metrics().items()}
        measured = measured_peak_bytes(jax.local_devices())
        return values if measured is None else values | {"device_peak_mib": measured / 2**20}

    def _step_line(self, position: Position, values: dict[str, float]) -> StepLine:
        hidden = ("seconds", "num_skipped")
        shown = {name: value for name, value in values.items() if name not in hidden and "/" not in name}
        if len(shown) > MOST_SHOWN:
            shown = {name: value for name, value in shown.items() if name in MAIN_METRICS}
        return StepLine(
            epoch=position.epoch,
            num_epochs=self.spec.num_epochs,
            epoch_step=position.epoch_step,
            steps_per_epoch=self.spec.loader.steps_per_epoch,
            global_step=position.global_step,
            seconds=values["seconds"],
            metrics=shown,
        )

    def evaluate(self, step: int) -> None:
        """Measures the held-out loss, or held-out answers, after `step` steps; the best actor so far is kept."""
        assert (evaluation := self.spec.evaluation) is not None
        start = time.perf_counter()
        if isinstance(evaluation, RolloutEvaluation):
            values, self.samples[step] = evaluate_rollouts(self.executor, evaluation, self.spec.decode_fn)
        else:
            values = evaluate_loss(self.executor, evaluation)
        if self.metrics is not None:
            self.metrics.write(step, values, kind="eval")
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("evaluation after step %d: %s (%.1f s)", step, text, time.perf_counter() - start)
        if isinstance(evaluation, RolloutEvaluation) and evaluation.best_metric is not None and step > 0:
            self._keep_best(evaluation.role, values[evaluation.best_metric], step)

    def _keep_best(self, role: str, value: float, step: int) -> None:
        """Saves the role in place of the best checkpoint before when it is better than that."""
        if self.best is not None and not value > self.best:
            return
        self.best = value
        before = list((self.spec.paths.checkpoints / role).glob("best-*"))
        self._export(role, f"best-globalstep{step}")
        for path in before if is_first() else ():
            shutil.rmtree(path)

    def _export(self, name: str, directory: str) -> None:
        """Writes a role's parameters as a HuggingFace checkpoint, unless it is there from before a restart."""
        out_dir, role = self.spec.paths.checkpoints / name / directory, self.roles[name]
        if out_dir.exists():
            logger.info("%s is there from before the restart and is kept", out_dir)
            return
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        save_hf(
            self.executor.params(name),
            role.model.config,
            out_dir,
            source_dir=role.spec.path,
            # A model from scratch has no weights to take the precision from: its masters are kept as they are.
            dtype="float32" if role.spec.init_from_scratch else "source",
            max_shard_bytes=self.spec.max_shard_bytes,
            ends=role.spec.ends,
        )
        logger.info("saved %s to %s", name, out_dir)

    def save(self, position: Position, *, export: bool) -> None:
        """Saves every role that changes as a HuggingFace checkpoint, when `export`, then the state to continue from.

        A run continues after the step of that state, so whatever else belongs to the step has to be there before it.
        """
        changed = {average.role for average in self.spec.averages}
        states = {
            name: state
            for name, state in self.executor.states.items()
            if isinstance(state, TrainState) or name in changed
        }
        for name in states if export else ():
            self._export(name, checkpoint_name(position))
        counters = {**_counters(self.spec), "controls": self.executor.controls, "best": self.best}
        state = RunState(
            step=position.global_step,
            roles=states,
            counters=counters,
            empty_layers=_empty_layers(self.roles, states),
        )
        self.checkpointer.save(state)

    def finish(self) -> None:
        """Writes the report and says where everything is."""
        log = self.executor.compile_log
        logger.info("compiled %d programs in %.1f s", len(log.entries), log.seconds)
        if self.step_seconds:
            mean = float(np.mean(self.step_seconds))
            logger.info(
                "mean step time %.3f s over %d steps (steps that compiled left out)", mean, len(self.step_seconds)
            )
        if is_first():
            self.executor.timeline.draw(self.spec.paths.logs / "timeline.png")
            self.executor.timeline.write_trace(self.spec.paths.logs / "trace.json")
            draw_graph(self.spec.graph, self.spec.paths.logs / "graph.png")
            report = write_report(
                self.spec.paths.logs, title=self.spec.title, summary=self._summary(), sections=self._sections()
            )
            logger.info("report: %s", report)

    def _summary(self) -> dict[str, str]:
        spec, log = self.spec, self.executor.compile_log
        tokens_per_second = self.num_tokens / sum(self.step_seconds) if self.step_seconds else math.nan
        return {
            "steps": f"{self.first_step} to {self.last_step} of {spec.loader.total_steps}",
            "parameters": ", ".join(f"{name} {role.model.num_params:,}" for name, role in self.roles.items()),
            "layouts": ", ".join(f"{name} {layout}" for name, layout in spec.layouts.items()),
            "rows x tokens of a batch": str(spec.loader.shapes),
            "padding": f"{spec.loader.padding_share:.1%} of the tokens computed",
            "tokens per second": f"{tokens_per_second:,.0f}",
            "programs compiled": f"{len(log.entries)} in {log.seconds:.1f} s",
            "time of this process": format_seconds(time.monotonic() - self.started),
            "checkpoints": str(spec.paths.checkpoints),
        }

    def _sections(self) -> list[Section]:
        rows = tuple((name, shapes, f"{seconds:.1f}") for name, shapes, seconds in self.executor.compile_log.entries)
        compiled = Section(title="Compiled programs", columns=("call", "rows x tokens", "seconds"), rows=rows)
        return [*self._sample_sections(), compiled]

    def _sample_sections(self) -> list[Section]:
        """Returns the answers of the first and of the last evaluation, side by side."""
        if not self.samples:
            return []
        steps = sorted({min(self.samples), max(self.samples)})
        columns = ("draw", "prompt", *(f"after step {step}" for step in steps))
        rows = [
            (answers[0].variant, answers[0].prompt, *(f"{a.answer} (reward {a.reward:.3g})" for a in answers))
            for answers in zip(*(self.samples[step] for step in steps), strict=True)
        ]
        return [Section(title="Samples on held-out prompts", columns=columns, rows=tuple(rows))]

    def _refuse_nonfinite(self, values: dict[str, float], step: int) -> None:
        """Raises RuntimeError when too many updates in a row had gradients that were not finite."""
        for name, value in values.items():
            if name.rsplit("/", 1)[-1] != "num_skipped" or value == 0:
                continue
            logger.warning(
                "step %d: gradients are not finite, the update was skipped (%d in a row)", step + 1, int(value)
            )
            if value >= self.spec.max_nonfinite_steps:
                saved = self.checkpointer.latest_step
                kept = (
                    "nothing was saved before" if saved is None else f"step {saved} is in {self.checkpointer.directory}"
                )
                raise RuntimeError(
                    f"step {step + 1}: gradients were not finite {int(value)} times in a row (max_nonfinite_steps); "
                    f"{kept}; lower the learning rate or look at the data"
                )


def checkpoint_name(position: Position) -> str:
    """Returns ReaL's directory name of a checkpoint."""
    return f"epoch{position.epoch}epochstep{position.epoch_step}globalstep{position.global_step}"


def _numbers(updates: Sequence[Metrics]) -> dict[str, float]:
    """Returns a call's metrics, of all its updates together."""
    on_devices = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(updates))
    return summarize(fetch(dict(update)) if on_devices else update for update in updates)


def _merge(by_call: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """Returns one dict of metrics; a name that several calls have starts with its call's."""
    names = [name for metrics in by_call.values() for name in metrics]
    return {
        f"{call}/{name}" if names.count(name) > 1 else name: value
        for call, metrics in by_call.items()
        for name, value in metrics.items()
    }


def _counters(spec: RunSpec) -> dict[str, int]:
    """Returns what must be the same in a run that continues, by the name that an error gives it."""
    return {"seed": spec.seed, "batch size or dataset": spec.loader.fingerprint}


def _empty_layers(roles: Mapping[str, Role], names: Iterable[str]) -> dict[str, int]:
    return {name: roles[name].model.config.num_empty_layers for name in names}


def _rank(name: str) -> tuple[int, str]:
    """Orders metrics as a person looks for them: the main ones first, counts last."""
    last = name.rsplit("/", 1)[-1]
    return (MAIN_METRICS.index(last) if last in MAIN_METRICS else len(MAIN_METRICS), name)


def _log_start(spec: RunSpec, first_step: int) -> None:
    logger.info(
        "%d steps of %s rows x tokens (%.1f%% padding), starting after step %d",
        spec.loader.total_steps, spec.loader.shapes, 100 * spec.loader.padding_share, first_step,
    )  # fmt: skip
