"""A run that answers a file of prompts: load, generate call by call, write as prompts are answered."""

import logging
import time
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from realjax.core.faults import explain_faults
from realjax.core.processes import largest
from realjax.core.texts import make_stop_fn
from realjax.core.trees import Tree
from realjax.dataflow.generation_run import GenerationSpec
from realjax.engine.batching import Generation, Request, generate
from realjax.engine.compiled import CompileLog
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.engine.state import TrainState
from realjax.record.console import format_seconds, make_console
from realjax.record.rundir import write_log
from realjax.reshard.fetch import fetch
from realjax.runtime.answers import AnswerFile, describe_answers, find_done, make_answers, open_run
from realjax.runtime.finite import refuse_nonfinite
from realjax.runtime.lock import lock_run
from realjax.runtime.roles import Role, build_role, load_role
from realjax.runtime.rollouts import choose_num_slots
from realjax.runtime.stop import StopSignal, signal_name

logger = logging.getLogger("realjax.generation")


def run(spec: GenerationSpec, console: Console | None = None) -> int:
    """Carries out the run; returns its exit code: 0 when it finished, 130 or 143 when a signal stopped it after a call.

    Raises RunFault when the machine, such as a full disk, did not let it go on.
    """
    role = build_role(spec.role, spec.layout, total_updates=0)
    log = CompileLog()
    slots = _make_slots(spec, role, log)
    with explain_faults(lambda: describe_answers(spec)), StopSignal() as stop, lock_run(spec.paths.logs):
        num_done = find_done(spec)
        num_left = len(spec.prompts) - (num_done or 0)
        # What may refuse the run comes first: it then leaves an earlier one's files where they are.
        params = load_role(role, spec.seed) if num_left else None
        file = open_run(spec, num_done)
        with write_log(spec.paths.logs):
            if params is None:
                logger.info("all %d prompts were answered before", num_done)
            else:
                logger.info(
                    "%d prompts (up to %d tokens), %d answers each, starting after prompt %d; %d decoded at once",
                    *(len(spec.prompts), spec.prompts.longest, spec.num_samples, num_done or 0, slots.num_slots),
                )
                assert not isinstance(params, TrainState), "a role without an optimizer is parameters alone"
                stop.defer()
                with _progress_bar(console) as progress:
                    session = Session(spec=spec, slots=slots, log=log, file=file, progress=progress, stop=stop)
                    if code := session.answer(params, num_done or 0):
                        return code
            if file is not None:
                file.finish()
                logger.info("answers: %s", file.path)
            return 0


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the calls of a run share."""

    spec: GenerationSpec
    slots: SlotPrograms
    log: CompileLog
    file: AnswerFile | None
    progress: Progress
    stop: StopSignal

    def answer(self, params: Tree, num_done: int) -> int:
        """Answers the prompts after the first `num_done`, call by call; returns the code of a signal that stopped it.

        0: all are answered.
        """
        spec, log, num_prompts, tally = self.spec, self.log, len(self.spec.prompts), Tally()
        stop_fn = make_stop_fn(spec.tokenizer, spec.stop) if spec.stop else None
        bar = self.progress.add_task("", total=num_prompts * spec.num_samples)
        for first in range(num_done, num_prompts, spec.prompts_per_call):
            requests = make_requests(spec, first)
            num_before, num_compiled, start = first * spec.num_samples, len(log.entries), time.perf_counter()
            show = lambda num_ended, before=num_before: self.progress.update(bar, completed=before + num_ended)
            generations = generate(self.slots, params, requests, stop_fn=stop_fn, fetch_fn=fetch, progress_fn=show)
            refuse_nonfinite(generations, spec.role.title)
            tally = tally.add(generations, time.perf_counter() - start, is_timed=len(log.entries) == num_compiled)
            if self.file is not None:
                self.file.append(make_answers(spec, requests, generations))
            num_answered = first + len(requests) // spec.num_samples
            seconds_left = tally.seconds / (num_answered - num_done) * (num_prompts - num_answered)
            rate, eta = f"{tally.tokens_per_second:,.0f} tokens/s", format_seconds(seconds_left)
            logger.info("%d of %d prompts answered, %s, ETA %s", num_answered, num_prompts, rate, eta)
            if (code := largest(self.stop.code)) and num_answered < num_prompts:
                name = signal_name(code)
                logger.warning("stopped by %s; recover_mode=auto continues after prompt %d", name, num_answered)
                return code
        logger.info("compiled %d programs in %.1f s", len(log.entries), log.seconds)
        logger.info(tally.text())
        return 0


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What has been generated, and how fast; calls that compiled a program count for the rate only if all did."""

    num_answers: int = 0
    num_ended: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    timed_tokens: int = 0
    timed_seconds: float = 0.0

    def add(self, generations: list[Generation], seconds: float, *, is_timed: bool) -> "Tally":
        """Returns the tally with another call's answers."""
        num_tokens = sum(len(generation.tokens) for generation in generations)
        return Tally(
            num_answers=self.num_answers + len(generations),
            num_ended=self.num_ended + sum(generation.ended for generation in generations),
            num_tokens=self.num_tokens + num_tokens,
            seconds=self.seconds + seconds,
            timed_tokens=self.timed_tokens + is_timed * num_tokens,
            timed_seconds=self.timed_seconds + is_timed * seconds,
        )

    @property
    def tokens_per_second(self) -> float:
        if self.timed_seconds:
            return self.timed_tokens / self.timed_seconds
        return self.num_tokens / max(self.seconds, 1e-9)

    def text(self) -> str:
        note = "calls that compiled left out" if self.timed_seconds else "compilation counted"
        return (
            f"{self.num_answers:,} answers, {self.num_tokens:,} tokens (mean {self.num_tokens / self.num_answers:.1f}, "
            f"{self.num_ended / self.num_answers:.1%} ended by end-of-text or a stop text) in {self.seconds:.1f} s: "
            f"{self.tokens_per_second:,.0f} tokens/s ({note})"
        )


def make_requests(spec: GenerationSpec, first: int) -> list[Request]:
    """Returns the requests of the call that begins with prompt `first`: each prompt's samples one after the other."""
    indices = range(first, min(first + spec.prompts_per_call, len(spec.prompts)))
    return [
        Request(tokens=spec.prompts.example(index)["tokens"], row_id=index, sample_id=sample)
        for index in indices
        for sample in range(spec.num_samples)
    ]


def _make_slots(spec: GenerationSpec, role: Role, log: CompileLog) -> SlotPrograms:
    per_call = min(spec.prompts_per_call, len(spec.prompts)) * spec.num_samples
    num_slots = choose_num_slots(spec.num_slots, per_call, spec.layout)
    # Nothing is trained on these answers: what they were drawn from need not be kept.
    config = replace(spec.config, force_no_logits_mask=True)
    sampler = Sampler(config=config, eos_ids=spec.eos_ids, seed=spec.seed)
    return SlotPrograms(role.model, spec.layout, sampler, num_slots, role.forward_options, log)


def _progress_bar(console: Console | None) -> Progress:
    console = make_console() if console is None else console
    columns = (TextColumn("answer"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_interactive)
