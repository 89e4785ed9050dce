"""Measures what generation beside training saves: two processes with a core each are a real cluster of two devices.

    python -m tools.bench.ahead --model DIR --out DIR [--steps 8] [--staleness 1]

GRPO on prompts and answers of a fixed length: with steps that draw their own answers, every call on both devices, then
generation on one and training on the other in turn; and with answers drawn ahead, each on its own device. Prints for
each the median seconds of a step, of generation and of training, and the share of the shorter of the two during which
the other ran too. A model's directory needs its config.json and a tokenizer. The cores must be quiet.
"""

import argparse
import getpass
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.planner import Bench, run
from tools.bench.plans import D2, ONE, OTHER, Calls

JUDGES = ("rew_inf", "ref_inf")
NUM_PROMPTS = 32
APART: Calls = {"actor_gen": ONE, "actor_train": OTHER, **dict.fromkeys(JUDGES, ONE)}
CALLS: Sequence[str] = ("actor_gen", "actor_train", *JUDGES)
BOTH: Calls = dict.fromkeys(CALLS, D2)
Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over the steps that compile nothing, in seconds; `overlap` is a share of the shorter call."""

    step: float
    generate: float
    train: float
    overlap: float


def measure(bench: Bench, name: str, calls: Calls, staleness: int, steps: int) -> Measured:
    """Returns what the steps of a run took."""
    options: dict[str, object] = {
        "experiment_name": "ahead",
        "trial_name": name,
        "fileroot": bench.out,
        "mode": "local",
        "n_gpus_per_node": 2,
        "allocation_mode": "manual",
        "benchmark_steps": steps,
        "total_train_epochs": steps,
        "staleness": staleness,
        # The same work, whether it is needed or not.
        "ppo.recompute_logprobs": True,
        **bench.describe(bench.models[0], "grpo"),
    }
    options |= {f"{call}.{option}": value for call, own in calls.items() for option, value in own.items()}
    run(["grpo", *(f"{option}={value}" for option, value in options.items())])
    logs = bench.out / "logs" / getpass.getuser() / "ahead" / name
    records = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    # The first steps compile, and the last draws nothing ahead.
    kept = [record for record in records if record["kind"] == "train"][steps // 3 : -1]
    spans = read_spans(logs / "trace.json")
    middle = lambda key: statistics.median(record[key] for record in kept)
    return Measured(
        step=middle("seconds"),
        generate=middle("time/actor_gen"),
        train=middle("time/actor_train"),
        overlap=statistics.median(
            share_overlap(spans[record["step"] - 1, "actor_gen"], spans[record["step"] - 1, "actor_train"])
            for record in kept
        ),
    )


def read_spans(trace: Path) -> dict[tuple[int, str], Span]:
    """Returns when each call of each step began and ended, in seconds."""
    events = json.loads(trace.read_text())["traceEvents"]
    return {
        (event["args"]["step"], event["name"]): (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
    }


def share_overlap(one: Span, other: Span) -> float:
    """Returns the share of the shorter span in which both are."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return max(0.0, shared) / min(one[1] - one[0], other[1] - other[0])


def main(words: Sequence[str] | None = None) -> None:
    """Prints a line for each run as it is measured, then how much faster a step is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--staleness", type=int, default=1)
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    bench, found = Bench(models=[args.model], out=args.out, num_prompts=NUM_PROMPTS), dict[str, Measured]()
    print(f"{'':22} {'step':>8} {'generate':>8} {'train':>8} {'overlap':>8}")
    for name, calls, staleness in (("both", BOTH, 0), ("in-turn", APART, 0), ("beside", APART, args.staleness)):
        found[name] = one = measure(bench, name, calls, staleness, args.steps)
        print(f"{name:22} {one.step:8.3f} {one.generate:8.3f} {one.train:8.3f} {one.overlap:8.1%}", flush=True)
    for name in ("both", "in-turn"):
        print(f"beside against {name}: {found[name].step / found['beside'].step:.2f} times as fast")


if __name__ == "__main__":
    main()
