"""Where a step's time goes, beside what the hardware allows: a table of the calls of a step.

    python -m tools.bench.roofline                          # sft, dpo, grpo and ppo
    python -m tools.bench.roofline ppo --steps 9

The runs are those of `tools.bench.ppo`, `grpo` and `dpo` without TRL, and SFT on the same model. `least` is what a call
needs at the least: its programs' matrix products, counted in what XLA compiled, at the rate of a large product; or, of
decoding, where that is longer, the weights read once a round at the memory's bandwidth. Seconds are medians over the
steps that compiled nothing, rates are measured in the same process.
"""

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from realjax.aot.hlo import read
from realjax.engine.compiled import Compiled
from realjax.engine.slot_arrays import CHUNK_LEN
from realjax.runtime.executor import Executor
from tools.bench import dpo, given, grpo, ppo
from tools.bench.devices import start_devices
from tools.bench.generate import stream_bandwidth
from tools.bench.sft import matmul_rate

BENCHES = {"dpo": dpo, "grpo": grpo, "ppo": ppo}
NUM_SEQUENCES, PROMPT_LEN, ANSWER_LENS = 8, 32, (16, 160)  # of SFT
DECODE = ": decode"

Runs = Counter[tuple[str, jax.stages.Compiled]]  # how often each program ran, by its name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=["sft", *BENCHES], metavar="sft|dpo|grpo|ppo")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    start_devices()
    rate, bandwidth = matmul_rate("float32").clock, stream_bandwidth(0)
    print(f"matrix products {rate / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s", flush=True)
    for experiment in args.experiments:
        with tempfile.TemporaryDirectory() as folder:
            _, executor = made = given.make_executor(experiment, write_inputs(experiment, Path(folder)))
            seconds, runs = take_steps(*made, args.steps)
        print_table(experiment, seconds, least_seconds(executor, runs, rate, bandwidth))


def write_inputs(experiment: str, folder: Path) -> dict[str, Any]:
    """Writes models and rows; returns the options of the run."""
    if (bench := BENCHES.get(experiment)) is not None:
        args = bench.parse_args([])
        args.inputs = folder
        bench.write_inputs(folder, args)
        return bench.options(args)
    given.write_models(folder)
    rng = np.random.default_rng(0)
    lengths = rng.integers(*ANSWER_LENS, given.NUM_BATCHES * NUM_SEQUENCES)
    draw = lambda n: given.draw_text(rng, n)
    given.write_rows(folder, [{"prompt": draw(PROMPT_LEN), "answer": " " + draw(n)} for n in lengths])
    args = argparse.Namespace(inputs=folder, devices=1, plan=None)
    return {
        **given.common_options(args, {"model": given.ACTOR}, trained=("model",)),
        "dataset.train_path": folder / given.ROWS,
        "dataset.max_seqlen": PROMPT_LEN + ANSWER_LENS[1] + 1,
        "dataset.train_bs_n_seqs": NUM_SEQUENCES,
    }


def take_steps(loader: Any, executor: Executor, num_steps: int) -> tuple[dict[str, float], Runs]:
    """Returns the seconds of each call and of the step, and the programs of a step."""
    taken: list[dict[str, float]] = []
    for step in range(loader.total_steps):
        num_compiled, start = len(executor.compile_log.entries), executor.timeline.now()
        with counted() as runs:
            result = executor.step(loader.batch(step), step)
        jax.block_until_ready((executor.states, result.metrics))
        seconds = {"step": executor.timeline.now() - start}
        seconds |= {one.name: one.end - one.start for one in executor.timeline.of_step(step)}
        if len(executor.compile_log.entries) == num_compiled:
            taken.append(seconds)
        if len(taken) == num_steps + 1:  # the first warms up
            return {name: statistics.median(one[name] for one in taken[1:]) for name in seconds}, runs
    raise SystemExit(f"only {len(taken)} of {loader.total_steps} steps compiled nothing")


@contextmanager
def counted() -> Iterator[Runs]:
    """While entered, counts the programs that run."""
    runs: Runs = Counter()
    call, run = Compiled.__call__, jax.stages.Compiled.__call__
    names: list[str] = []

    def call_named(self: Compiled, *args: object) -> Any:
        names.append(self.name)
        return call(self, *args)

    def run_and_count(self: jax.stages.Compiled, *args: object) -> Any:
        runs[names[-1], self] += 1
        return run(self, *args)

    with (
        mock.patch.object(Compiled, "__call__", call_named),
        mock.patch.object(jax.stages.Compiled, "__call__", run_and_count),
    ):
        yield runs


def least_seconds(executor: Executor, runs: Runs, rate: float, bandwidth: float) -> dict[str, float]:
    """Returns what each call needs at the least."""
    least: dict[str, float] = {}
    calls = {mfc.name: mfc for mfc in executor.graph.mfcs}
    for (name, program), times in runs.items():
        found, call = read(program.as_text() or ""), name.split(":")[0]
        rounds = CHUNK_LEN if name.endswith(DECODE) else 1
        products = (found.matmul_flops - found.open_flops + found.open_flops * rounds) / rate
        weights = executor.roles[calls[call].role].model.num_params * 4 * rounds / bandwidth
        needed = max(products, weights) if name.endswith(DECODE) else products
        least[call] = least.get(call, 0.0) + times * needed
    return least


def print_table(experiment: str, seconds: dict[str, float], least: dict[str, float]) -> None:
    step = seconds.pop("step")
    rows = [(name, found, least.get(name, 0.0)) for name, found in seconds.items()]
    rows += [("rest", step - sum(seconds.values()), 0.0), ("step", step, sum(least.values()))]
    print(f"\n| {experiment} | seconds | of the step | least | of what is allowed |\n|---|---|---|---|---|")
    for name, found, needed in rows:
        share = f"{needed / found:.0%}" if needed else ""
        print(f"| `{name}` | {found:.3f} | {found / step:.0%} | {needed:.3f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
