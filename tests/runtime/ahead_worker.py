"""One process of several: a run of GRPO whose answers are drawn up to two steps ahead, on a device of their own.

Run by test_ahead_processes.py as `ahead_worker.py <port> <num_processes> <process_id> <folder> <is_shaken>`, on the
models and data in the folder. Shaken, whatever is dispatched waits for a random time first, another in each process.
Prints a line of JSON: the metrics of each step, what was dispatched in which order, and the seconds between which the
last step's training and generation ran, both made to take the same time.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from realjax.core.metrics import summarize
from realjax.engine.batching import Batcher
from realjax.engine.compiled import Compiled
from realjax.reshard.fetch import fetch
from realjax.runtime import calls
from realjax.runtime.ahead import Ahead
from realjax.runtime.checkpoint import RunCheckpointer, RunState, find_save
from realjax.runtime.executor import Executor, StepResult
from realjax.runtime.flight import dump_rows, flatten_rows, join_rows
from realjax.runtime.programs import Programs
from tests.given.processes import work
from tests.given.runs import Given, build_rl_spec, load_executor

STEPS = 4
SLOW_SECONDS = 1.5
OPTIONS: dict[str, Any] = {
    "staleness": 2,
    "n_gpus_per_node": 2,
    "allocation_mode": "heuristic",
    "algo__gen__max_new_tokens": 16,
    "algo__gen__num_slots": 8,
    "algo__ppo_n_minibatches": 1,
    "algo__kl_ctl": 0,
}


class Slow:
    """A training program whose metrics take their time: a sleep on the device, which needs no core."""

    def __init__(self, program: Compiled, spans: list[tuple[float, float]]) -> None:
        self.program, self.device_bytes = program, program.device_bytes

        def wait(value: np.ndarray) -> np.ndarray:
            start = time.time()
            time.sleep(SLOW_SECONDS)
            spans.append((start, time.time()))
            return value

        self.wait = jax.jit(lambda x: jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x))

    def __call__(self, state: Any, batch: Any) -> Any:
        state, metrics = self.program(state, batch)
        total = metrics["n_tokens"]
        if not total.sum.is_fully_addressable:
            return state, metrics  # another process's
        return state, metrics | {"n_tokens": type(total)(self.wait(total.sum))}


def log_calls(order: list[str], rng: random.Random | None) -> None:
    """Has every call write its name into `order`, and wait before that where there is a generator of random numbers."""

    def logged(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(executor: Any, call: Any, batch: Any, step: Any) -> Any:
            if rng is not None:
                time.sleep(0.3 * rng.random() ** 2)
            order.append(f"{step} {call.name}")
            return run(executor, call, batch, step)

        return wrapper

    for kind, run in list(calls.RUN.items()):
        calls.RUN[kind] = logged(run)


class Polls:
    """Waits before each look at what was drawn, as long as `seconds_fn` says."""

    def __init__(self, seconds_fn: Callable[[], float]) -> None:
        self.seconds_fn, poll = seconds_fn, Batcher.poll

        def slow(batcher: Batcher) -> bool:
            time.sleep(self.seconds_fn())
            return poll(batcher)

        Batcher.poll = slow


def watch(ahead: Ahead, trained: list[tuple[float, float]], drawn: list[tuple[float, float]]) -> None:
    """Has training take its time from now on, and notes between which seconds it runs, and between which answers are
    drawn.
    """
    make, draw = Programs.train_step, ahead._draw

    def timed(*args: Any, **options: Any) -> None:
        start = time.time()
        draw(*args, **options)
        drawn.append((start, time.time()))

    Programs.train_step = lambda *args: Slow(make(*args), trained)
    ahead._draw = timed


def save_and_find(directory: Path, executor: Executor) -> bool:
    """Returns whether the rows in flight come back from a save as they are."""
    directory.mkdir(exist_ok=True)
    with RunCheckpointer(directory, 2) as checkpointer:
        checkpointer.save(RunState(step=1, roles={}, rollouts=flatten_rows(executor.rows)))
        checkpointer.wait()
    save = find_save(directory)
    return save is not None and dump_rows(join_rows(save.rollouts)) == dump_rows(executor.rows)


def read_result(result: StepResult) -> dict[str, Any]:
    values: dict[str, Any] = {"tokens": np.asarray(result.batch["tokens"]).tolist()}
    for call, updates in result.metrics.items():
        on_host = [fetch(dict(update)) if call.endswith("train") else update for update in updates]
        values |= {f"{call}/{name}": value for name, value in summarize(on_host).items()}
    return values


def main(folder: str, is_shaken: str) -> None:
    spec = build_rl_spec(Given(Path(folder)), Path(folder) / "out", "grpo", **OPTIONS)
    executor = load_executor(spec)
    rng = random.Random(jax.process_index()) if is_shaken == "1" else None
    order, trained, drawn, saved = list[str](), list[tuple[float, float]](), list[tuple[float, float]](), False
    log_calls(order, rng)
    polls = Polls(lambda: 0.1 * rng.random() if rng else 0.0)
    ahead, records = Ahead(executor, executor.plan.loader, STEPS), list[dict[str, Any]]()
    for step in range(STEPS):
        if rng is not None and step == STEPS - 2:
            saved = save_and_find(Path(folder) / "saves", executor)
            watch(ahead, trained, drawn)
            polls.seconds_fn = lambda: SLOW_SECONDS / 32  # there are about as many
        records.append(read_result(ahead.step(step)))
        executor.timeline.of_step(step)
    found = {"records": records, "order": order, "trained": trained, "drawn": drawn, "saved": saved}
    layouts = {call.name: executor.plan.layouts[call.name].device_names for call in executor.graph.mfcs}
    print(json.dumps(found | {"layouts": layouts}), flush=True)


if __name__ == "__main__":
    work(main, num_devices=2)
