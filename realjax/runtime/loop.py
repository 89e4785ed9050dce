"""The run: restore or load, step, log, evaluate, save, report."""

import dataclasses
import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
from rich.console import Console

from realjax.allocation.plan import make_plan
from realjax.core.loss import LossSums, finalize
from realjax.core.trees import num_params
from realjax.data.loader import Position
from realjax.dataflow.picture import draw_graph
from realjax.dataflow.run import RunSpec
from realjax.engine.state import TrainState
from realjax.hf.save import save_hf
from realjax.runtime.checkpoint import RunCheckpointer, RunState
from realjax.runtime.console import ProgressDisplay, StepLine, format_seconds
from realjax.runtime.executor import Executor
from realjax.runtime.metrics import MetricsWriter
from realjax.runtime.processes import any_process, fetch, is_first
from realjax.runtime.report import REPORT_FILE, Section, write_report
from realjax.runtime.roles import Role, build_role, load_role
from realjax.runtime.rundir import open_run_directory, write_log
from realjax.runtime.triggers import StopSignal, Trigger

logger = logging.getLogger("realjax.loop")
STOPPED = 143  # the shell's code for a process ended by SIGTERM


def run(spec: RunSpec, console: Console | None = None) -> int:
    """Carries out a run and returns its exit code: 0 when it finished, 143 when SIGTERM stopped it after a save."""
    total_updates = spec.loader.total_steps
    plan = make_plan(spec.graph, spec.layouts, {name: role.offload for name, role in spec.roles.items()})
    logger.info("allocation:\n%s", plan.describe())
    roles = {
        name: build_role(role, plan.homes[name], total_updates, is_offloaded=name in plan.offloaded)
        for name, role in spec.roles.items()
    }
    # After what may refuse the run, which then leaves an earlier one's files where they are.
    has_state = open_run_directory(spec)
    with write_log(spec.paths.logs), RunCheckpointer(spec.paths.recover, spec.max_recover_saves) as checkpointer:
        if has_state and (checkpointer.latest_step or 0) >= total_updates and (spec.paths.logs / REPORT_FILE).exists():
            logger.info("all %d steps were done before, see %s", total_updates, spec.paths.logs / REPORT_FILE)
            return 0
        state = _first_state(spec, roles, checkpointer if has_state else None)
        executor = Executor(spec.graph, spec.layouts, roles, dict(state.roles))
        with _open_metrics(spec, state.step) as metrics, StopSignal() as stop:
            session = Session(spec, roles, executor, checkpointer, metrics, state.step, console)
            return session.run(stop)


def _open_metrics(spec: RunSpec, step: int) -> AbstractContextManager[MetricsWriter | None]:
    """Returns the writer in the first process, None in the others: a run has one record."""
    return MetricsWriter(spec.paths.logs, spec.wandb_mode, resume_step=step) if is_first() else nullcontext()


def _first_state(spec: RunSpec, roles: dict[str, Role], checkpointer: RunCheckpointer | None) -> RunState:
    """Returns the last complete save when there is one to continue from, else the state at step 0."""
    trained = {name: role for name, role in roles.items() if role.optimizer is not None}
    if checkpointer is None or checkpointer.latest_step is None:
        return RunState(step=0, roles={name: load_role(role, spec.seed) for name, role in roles.items()})
    state = checkpointer.restore({name: role.abstract_state() for name, role in trained.items()})
    for name, value in _counters(spec).items():
        if state.counters.get(name) != value:
            raise ValueError(
                f"recover: the save in {spec.paths.recover} was made with another {name}, so the samples to come would "
                f"not be those that it left: continue with the same {name}, or use another trial_name"
            )
    fixed = {name: load_role(role, spec.seed) for name, role in roles.items() if name not in trained}
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
        first_step: int,
        console: Console | None,
    ) -> None:
        self.spec, self.roles, self.executor = spec, roles, executor
        self.checkpointer, self.metrics = checkpointer, metrics
        self.first_step, self.started = first_step, time.monotonic()
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
        by_call = self.executor.step(batch, step)
        by_call = {call: fetch(metrics) for call, metrics in by_call.items()}
        values = {name: float(value) for name, value in _merge(by_call).items()}
        seconds = time.perf_counter() - start
        self._refuse_nonfinite(values, step)
        values |= self._call_metrics(step)
        values |= self._learning_rates(step) | {"tokens_per_second": batch.num_tokens / seconds, "seconds": seconds}
        values = {name: values[name] for name in sorted(values, key=_rank)}
        if len(self.executor.compile_log.entries) == num_compiled:
            self.step_seconds.append(seconds)
            self.num_tokens += batch.num_tokens
        if self.metrics is not None:
            self.metrics.write(step + 1, {**values, "epoch": position.epoch})
            self.display.finish_step(self._step_line(position, values))
        return position

    def _call_metrics(self, step: int) -> dict[str, float]:
        """Returns seconds, TFLOP/s and moved bytes of each call of the step, in a graph of several calls."""
        records = self.executor.timeline.of_step(step)
        if len(records) == 1:
            return {}
        values = {}
        for record in records:
            seconds = max(record.end - record.start, 1e-9)
            values[f"time/{record.name}"] = seconds
            values[f"tflops/{record.name}"] = record.num_flops / seconds / 1e12
            values[f"moved_mib/{record.name}"] = record.bytes_moved / 2**20
        return values

    def _step_line(self, position: Position, values: dict[str, float]) -> StepLine:
        hidden = ("seconds", "num_skipped")
        shown = {name: value for name, value in values.items() if name not in hidden and "/" not in name}
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
        """Measures the held-out loss after `step` steps."""
        assert (evaluation := self.spec.evaluation) is not None
        start = time.perf_counter()
        total: LossSums | None = None
        for i in range(evaluation.loader.total_steps):
            sums = fetch(self.executor.evaluate(evaluation, evaluation.loader.batch(i)))
            total = sums if total is None else jax.tree.map(np.add, sums, total)
        assert total is not None
        values = {name: float(np.asarray(x)) for name, x in finalize({"loss": total.loss, **total.metrics}).items()}
        if self.metrics is not None:
            self.metrics.write(step, values, kind="eval")
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("evaluation after step %d: %s (%.1f s)", step, text, time.perf_counter() - start)

    def save(self, position: Position, *, export: bool) -> None:
        """Saves every trained role as a HuggingFace checkpoint, when `export`, and then the state to continue from.

        A run continues after the step of that state, so whatever else belongs to the step has to be there before it.
        """
        trained = {name: s for name, s in self.executor.states.items() if isinstance(s, TrainState)}
        for name, state in trained.items() if export else ():
            out_dir = self.spec.paths.checkpoints / name / checkpoint_name(position)
            role = self.roles[name]
            if out_dir.exists():
                logger.info("%s is there from before the restart and is kept", out_dir)
                continue
            out_dir.parent.mkdir(parents=True, exist_ok=True)
            save_hf(
                state.params,
                role.model.config,
                out_dir,
                source_dir=role.spec.path,
                # A model from scratch has no weights to take the precision from: its masters are kept as they are.
                dtype="float32" if role.spec.init_from_scratch else "source",
                max_shard_bytes=self.spec.max_shard_bytes,
            )
            logger.info("saved %s to %s", name, out_dir)
        self.checkpointer.save(RunState(step=position.global_step, roles=trained, counters=_counters(self.spec)))

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
            "parameters": ", ".join(f"{name} {num_params(role.model.abstract):,}" for name, role in self.roles.items()),
            "layouts": ", ".join(f"{name} {layout}" for name, layout in spec.layouts.items()),
            "rows x tokens of a batch": f"{spec.loader.shape[0]} x {spec.loader.shape[1]}",
            "padding": f"{spec.loader.padding_share:.1%} of the tokens computed",
            "tokens per second": f"{tokens_per_second:,.0f}",
            "programs compiled": f"{len(log.entries)} in {log.seconds:.1f} s",
            "time of this process": format_seconds(time.monotonic() - self.started),
            "checkpoints": str(spec.paths.checkpoints),
        }

    def _sections(self) -> list[Section]:
        rows = tuple((name, shapes, f"{seconds:.1f}") for name, shapes, seconds in self.executor.compile_log.entries)
        return [Section(title="Compiled programs", columns=("call", "rows x tokens", "seconds"), rows=rows)]

    def _learning_rates(self, step: int) -> dict[str, float]:
        total = self.spec.loader.total_steps
        trained = {name: role.spec.optimizer for name, role in self.roles.items() if role.spec.optimizer}
        rates = {name: float(optimizer.learning_rate(step, total)) for name, optimizer in trained.items()}
        return {"lr": next(iter(rates.values()))} if len(rates) == 1 else {f"{name}/lr": r for name, r in rates.items()}

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


def _merge(by_call: dict) -> dict:
    """Returns one dict of metrics; with several training calls each name starts with its call's."""
    if len(by_call) == 1:
        return dict(next(iter(by_call.values())))
    return {f"{call}/{name}": value for call, metrics in by_call.items() for name, value in metrics.items()}


def _counters(spec: RunSpec) -> dict[str, int]:
    """Returns what must be the same in a run that continues, by the name that an error gives it."""
    return {"seed": spec.seed, "batch size or dataset": spec.loader.fingerprint}


def _rank(name: str) -> tuple[int, str]:
    """Orders metrics as a person looks for them: the loss first, counts last."""
    order = ("loss", "ppl", "lr", "grad_norm", "tokens_per_second")
    last = name.rsplit("/", 1)[-1]
    return (order.index(last) if last in order else len(order), name)


def _log_start(spec: RunSpec, first_step: int) -> None:
    rows, row_len, _ = spec.loader.shape
    logger.info(
        "%d steps of %d rows x %d tokens (%.1f%% padding), starting after step %d",
        spec.loader.total_steps, rows, row_len, 100 * spec.loader.padding_share, first_step,
    )  # fmt: skip
