"""The run: restore or load, then step after step."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from realjax.allocation.choice import PLAN_FILE, dump_choices
from realjax.allocation.plan import AllocationPlan
from realjax.core.faults import explain_faults
from realjax.core.processes import is_first
from realjax.core.progress import Progress
from realjax.dataflow.picture import describe_graph
from realjax.dataflow.run import RunSpec
from realjax.record.answers import AnswerWriter
from realjax.record.metrics import MetricsWriter, import_wandb, replace_text
from realjax.record.report import REPORT_FILE
from realjax.record.rundir import write_log
from realjax.runtime.ahead import Ahead
from realjax.runtime.checkpoint import RunCheckpointer, RunState
from realjax.runtime.executor import Executor
from realjax.runtime.exports import Exports
from realjax.runtime.flight import join_rows
from realjax.runtime.places import describe_saved
from realjax.runtime.resume import find_start, first_state, is_finished, open_run_directory
from realjax.runtime.roles import build_roles
from realjax.runtime.session import Outputs, Session, tell_stalled
from realjax.runtime.sizes import Sizes
from realjax.runtime.stop import StopSignal
from realjax.runtime.watchdog import watch_run

logger = logging.getLogger("realjax.loop")


def run(spec: RunSpec, plan: AllocationPlan, console: Console | None = None, progress: Progress | None = None) -> int:
    """Carries out a run; returns its exit code: 0 when it finished, 130 or 143 when a signal stopped it after a save.

    `progress` is that of `watch_run`, where it is entered already. Raises RunFault when the machine, such as a full
    disk, did not let it go on.
    """
    logger.info("calls:\n%s", describe_graph(spec.graph))
    logger.info("allocation:\n%s", plan.describe())
    roles = build_roles(spec, plan)
    import_wandb(spec.wandb_mode)
    rest = lambda: describe_saved(spec.paths.recover)
    watch = (
        watch_run(spec.paths.logs, spec.watchdog_seconds, spec.watchdog_compile_seconds)
        if progress is None
        else nullcontext(progress)
    )
    with explain_faults(rest), StopSignal() as stop, watch as progress:
        progress.begin("the look for a save")
        save = find_start(spec)
        if save is not None and is_finished(spec, save):
            return _answer_finished(spec, save)
        # What may refuse the run comes first: it then leaves an earlier one's files where they are.
        state = first_state(spec, roles, save, progress)
        open_run_directory(spec, continues_after=None if save is None else save.step)
        if is_first():
            machine = spec.allocation.machine
            text = dump_choices(plan.choices, searched=plan.is_searched, machine=machine)
            replace_text(spec.paths.logs / PLAN_FILE, text)
        with (
            write_log(spec.paths.logs),
            RunCheckpointer(spec.paths.recover, spec.max_recover_saves, spec.keep_every) as checkpointer,
            Exports(spec, roles, state.counters.get("best")) as exports,
            _open_metrics(spec, state.step) as metrics,
        ):
            executor = Executor(spec, plan, roles, dict(state.roles), state.counters.get("controls"), progress)
            executor.rows, executor.sizes = join_rows(state.rollouts), Sizes(state.counters.get("sizes"))
            answers = _open_answers(spec, state.step)
            outputs = Outputs(
                checkpointer=checkpointer, exports=exports, metrics=metrics, answers=answers, console=console
            )
            session = Session(spec, plan, executor, state, outputs)
            ahead = Ahead(executor, plan.loader, session.last_step) if executor.graph.ahead else None
            session.begin()
            stop.defer()
            with session.display:
                for step in range(session.first_step, session.last_step):
                    session.begin_step(step)
                    if ahead is None:
                        result = executor.step(session.take_batch(step), step)
                        session.prepare_batch(step + 1)
                    else:
                        result = ahead.step(step)
                    if (code := session.finish_step(step, result, stop)) is not None:
                        return code
            return session.finish()


def _answer_finished(spec: RunSpec, save: RunState) -> int:
    """Returns the exit code of a run that was finished before: the same again."""
    logger.info("all %d steps were done before, see %s", save.step, spec.paths.logs / REPORT_FILE)
    stalled: Mapping[str, int] = save.counters.get("stalled", {})
    return tell_stalled(stalled)


def _open_metrics(spec: RunSpec, step: int) -> AbstractContextManager[MetricsWriter | None]:
    """Returns the writer in the first process, None in the others: a run has one record."""
    if not is_first():
        return nullcontext()
    return MetricsWriter(spec.paths.logs, spec.wandb_mode, spec.wandb_project, resume_step=step)


def _open_answers(spec: RunSpec, step: int) -> AnswerWriter | None:
    """Returns the writer of the answers after those of `step` steps; None in the other processes, or without a file."""
    if spec.answers is None or not is_first():
        return None
    num_prompts = min(step * spec.loader.batch_size, len(spec.answers.rows))
    return AnswerWriter(spec.paths.logs / spec.answers.name, num_prompts * spec.answers.num_samples)
