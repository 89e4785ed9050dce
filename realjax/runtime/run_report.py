"""The report of a run: what it is made of, collected step by step, and written now and then and at the end."""

import logging
import math
import time
from collections.abc import Mapping, Sequence

from realjax.core.processes import is_first
from realjax.dataflow.picture import draw_graph
from realjax.dataflow.run import RunSpec
from realjax.record.console import format_seconds
from realjax.record.forecast import Forecast
from realjax.record.report import ReportParts, Section, write_report
from realjax.record.rollouts import RolloutWriter, rollout_sections
from realjax.record.samples import SAMPLES_FILE, Sample, append_samples, drop_between, load_samples, sample_sections
from realjax.runtime.executor import Executor, StepResult

logger = logging.getLogger("realjax.loop")
# A page of a run that goes on is written at most so often, and takes at most a fiftieth of the time.
UPDATE_SECONDS, SHARE = 60.0, 50


class RunReport:
    """What a process knows for the report; the first one writes it."""

    def __init__(self, spec: RunSpec, executor: Executor, steps: range) -> None:
        """`steps` are those to take, counted from 0."""
        self.spec, self.plan, self.executor, self.steps = spec, executor.plan, executor, steps
        self.started = time.monotonic()
        # By the step after which they were taken; the record is the first process's.
        self.samples = load_samples(spec.paths.logs / SAMPLES_FILE, steps.start) if is_first() else {}
        self.rollouts = self._open_rollouts()
        predicted = executor.plan.predicted
        self.forecast = None if predicted is None else Forecast(predicted.metrics(), predicted.source)
        self.num_timed = self.num_tokens = 0  # steps that compiled nothing, and their tokens
        self.timed_seconds = 0.0
        self._due = 0.0

    def _open_rollouts(self) -> RolloutWriter | None:
        spec = self.spec
        if spec.rollouts is None or spec.decode_fn is None or not is_first():
            return None
        return RolloutWriter(spec.paths.logs, spec.rollouts, spec.decode_fn, self.steps.start)

    def time_step(self, seconds: float, num_tokens: int, values: Mapping[str, float]) -> None:
        """Takes in a step that compiled nothing, and what it measured."""
        self.num_timed, self.timed_seconds = self.num_timed + 1, self.timed_seconds + seconds
        self.num_tokens += num_tokens
        if self.forecast is not None:
            self.forecast.add(values)

    def show_answers(self, step: int, result: StepResult) -> None:
        """Takes in the answers of a step, and logs some where that is due."""
        if self.rollouts is not None and (text := self.rollouts.add(step, result.batch)) is not None:
            logger.info("%s", text)

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Takes in the answers to held-out prompts of the evaluation after a step."""
        self.samples.setdefault(step, []).extend(samples)
        drop_between(self.samples)
        if is_first():
            append_samples(self.spec.paths.logs / SAMPLES_FILE, step, samples)

    def update(self) -> None:
        """Writes the report as it stands, where that is due; where it cannot be, the run goes on."""
        start = time.monotonic()
        if not is_first() or start < self._due:
            return
        try:
            write_report(self.spec.paths.logs, self._parts(is_finished=False))
        except OSError as error:
            logger.warning("the report of the run so far cannot be written (%s)", error)
        end = time.monotonic()
        self._due = end + max(UPDATE_SECONDS, SHARE * (end - start))

    def finish(self) -> None:
        """Writes the last report, and the pictures that go into it."""
        logs = self.spec.paths.logs
        if not is_first():
            return
        self.executor.timeline.draw(logs / "timeline.png")
        self.executor.timeline.write_trace(logs / "trace.json")
        draw_graph(self.spec.graph, logs / "graph.png")
        logger.info("report: %s", write_report(logs, self._parts(is_finished=True)))

    def _parts(self, *, is_finished: bool) -> ReportParts:
        return ReportParts(
            title=self.spec.title, summary=self._summary(), sections=self._sections(), is_finished=is_finished
        )

    def _summary(self) -> dict[str, str]:
        spec, log = self.spec, self.executor.compile_log
        tokens_per_second = self.num_tokens / self.timed_seconds if self.num_timed else math.nan
        return {
            "steps": f"{self.steps.start} to {self.steps.stop} of {spec.loader.total_steps}",
            "parameters": ", ".join(f"{name} {role.model.num_params:,}" for name, role in self.executor.roles.items()),
            "layouts": ", ".join(f"{name} {layout}" for name, layout in self.plan.layouts.items()),
            "rows x tokens of a batch": str(self.plan.loader.shapes),
            "padding": f"{self.plan.loader.padding_share:.1%} of the tokens computed",
            "tokens per second": f"{tokens_per_second:,.0f}",
            "programs compiled": f"{len(log.entries)} in {log.seconds:.1f} s",
            "time of this process": format_seconds(time.monotonic() - self.started),
            "checkpoints": str(spec.paths.checkpoints),
        }

    def _sections(self) -> list[Section]:
        rows = tuple((name, shapes, f"{seconds:.1f}") for name, shapes, seconds in self.executor.compile_log.entries)
        compiled = Section(title="Compiled programs", columns=("call", "rows x tokens", "seconds"), rows=rows)
        answers = [] if self.rollouts is None else rollout_sections(self.rollouts.shown)
        forecast = [] if self.forecast is None else [self.forecast.section()]
        return [*sample_sections(self.samples), *answers, *forecast, compiled]
