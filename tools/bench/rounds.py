"""Two trainers that take turns, each in a process of its own: the side that asks, and the side that answers."""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.workers import start_workers

OURS, THEIRS = "realjax", "TRL"
NEEDED = ("trl", "torch", "accelerate", "datasets")
NUM_WARM = 2  # steps before any is timed; those that compile do not count

Seconds = dict[str, float]  # of each call, of the whole "step", and of all cores as "cpu"; and the peak "MiB"
WorkerFn = Callable[[argparse.Namespace], None]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1, help="of realjax, virtual ones on a CPU")
    parser.add_argument("--plan", help="realjax's allocation_mode; default: data parallel")
    parser.add_argument("--worker", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    return parser


def run(module: str, args: argparse.Namespace, write_fn: Callable[[Path], float], workers: dict[str, WorkerFn]) -> None:
    """Runs a bench's worker where this process is one, else both beside each other, and prints what they took.

    `write_fn(folder)` writes what they read, and returns the tokens of a step.
    """
    if args.worker:
        workers[args.worker](args)
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not compared with TRL, no module {', '.join(missing)}: --help says how to get them", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_fn(Path(folder))
        compare(module, [OURS] if missing else [OURS, THEIRS], folder, args, tokens)


def compare(module: str, names: list[str], folder: str, args: argparse.Namespace, tokens: float) -> None:
    """Prints a line for each of `names`, and their ratio; a step has `tokens` tokens."""
    rounds: dict[str, list[Seconds]] = {name: [] for name in names}
    with start_workers(module, names, "--inputs", folder) as workers:
        for name, worker in workers.items():
            print(f"{name}: {worker.read()}", flush=True)
        for _ in range(args.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.run(args.steps))
    for name, found in rounds.items():
        peak = max(one.pop("MiB") for one in found)
        medians = {call: statistics.median(one.get(call, 0.0) for one in found) / args.steps for call in found[0]}
        total, cpu = medians.pop("step"), medians.pop("cpu")
        calls = ", ".join(f"{call} {value:.2f}" for call, value in medians.items())
        speed = f"{total:6.2f} s a step, {tokens / total:6,.0f} tokens/s, {cpu:.2f} s of all cores"
        print(f"  {name:<8}{speed}, at most {peak:,.0f} MiB; {calls}")
    if len(names) == 2:
        pairs = list(zip(rounds[OURS], rounds[THEIRS]))
        for call in ("step", "cpu"):
            ratios = [theirs[call] / ours[call] for ours, theirs in pairs]
            print(f"  {call}: x{statistics.median(ratios):.2f} (x{min(ratios):.2f} to x{max(ratios):.2f} by round)")


class Turns:
    """A worker's side: lets its loop take as many steps as it is told, and answers with their seconds."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not mix with the answers
        self.num_asked = 0
        self._start_round()

    def begin(self, note: str) -> None:
        """Describes the loop once it is warm, and waits."""
        self._answer(note)

    def end_step(self, calls: Seconds, *, is_warm: bool = True) -> None:
        """Counts a step, and waits where it was the last of its round; one that is not warm starts the round anew."""
        if not is_warm:
            self._start_round()
            return
        self.num_left -= 1
        self.calls.update(calls)
        if self.num_left == 0:
            seconds = time.perf_counter() - self.start
            cpu = time.process_time() - self.cpu
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rest = seconds - self.calls.total()
            self._answer({"step": seconds, "cpu": cpu, **self.calls, "rest": rest, "MiB": peak})

    def _answer(self, value: Any) -> None:
        print(json.dumps(value), file=self.answers, flush=True)
        self.num_asked = int(sys.stdin.readline() or sys.exit())
        self._start_round()

    def _start_round(self) -> None:
        self.num_left, self.calls = self.num_asked, Counter()
        self.start, self.cpu = time.perf_counter(), time.process_time()


class StepMarks:
    """Where a trainer of TRL is in its step: when each of `names` ended, of those that its hooks tell of."""

    def __init__(self, turns: Turns, note: str) -> None:
        self.turns, self.note = turns, note
        self.ends: dict[str, float] = {}
        self.num_done, self.last = 0, time.perf_counter()

    def callback(self) -> Any:
        """Returns what tells a trainer's own ends of steps."""
        from transformers import TrainerCallback

        marks = self

        class Steps(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                marks.end_step()

        return Steps()

    def mark(self, name: str) -> None:
        """Says that `name` has just ended; the first time in a step counts."""
        self.ends.setdefault(name, time.perf_counter())

    def end_step(self) -> None:
        """Says that training, and with it the step, has just ended."""
        self.mark("training")
        calls, last = {}, self.last
        for name, end in self.ends.items():
            calls[name], last = end - last, end
        self.num_done += 1
        if self.num_done > NUM_WARM:
            self.turns.end_step(calls)
        elif self.num_done == NUM_WARM:
            self.turns.begin(self.note)
        self.ends, self.last = {}, time.perf_counter()
