"""Holds predictions against runs: two processes with a core each are a real cluster of two devices.

    python -m tools.bench.planner --model DIR --out DIR [--experiments sft,dpo,grpo,ppo] [--profile]

With --profile it first measures the two devices into `cluster.json` of the output directory. Each plan is then a run of
a few steps; predicted and measured seconds of a step are printed beside each other, and for each experiment where the
plan that the search picks stands among all. A model's directory needs its config.json and a tokenizer. The cores must
be quiet.
"""

import argparse
import getpass
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from realjax.launch.environment import COORDINATOR, NUM_PROCESSES, PROCESS_ID, PROCESSES_PER_NODE

NUM_STEPS = 6
NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 32, 32, 32
D2, T2, P2 = ({f"parallel.{name}_parallel_size": 2} for name in ("data", "model", "pipeline"))
ONE, OTHER = {"device_mesh": "NODE01:0"}, {"device_mesh": "NODE01:1"}
# By experiment and name, options by call; of `n_mbs` 2 or more, of pipeline stages too.
PLANS: Mapping[str, Mapping[str, Mapping[str, Mapping[str, object]]]] = {
    "sft": {
        "d2": {"allocation": D2},
        "d2, 2 micro-batches": {"allocation": D2 | {"n_mbs": 2}},
        "t2": {"allocation": T2},
        "p2": {"allocation": P2},
        "p2, 2 micro-batches": {"allocation": P2 | {"n_mbs": 2}},
    },
    "dpo": {
        "d2": {"actor_train": D2, "ref_inf": D2},
        "t2, ref d2": {"actor_train": T2, "ref_inf": D2},
        "ref on one": {"actor_train": D2, "ref_inf": ONE},
        "side by side": {"actor_train": ONE, "ref_inf": OTHER},
        "p2, ref p2": {"actor_train": P2, "ref_inf": P2},
    },
    "grpo": {
        "d2": {"actor_gen": D2, "rew_inf": D2, "ref_inf": D2, "actor_train": D2},
        "train t2": {"actor_gen": D2, "rew_inf": D2, "ref_inf": D2, "actor_train": T2},
        "judges apart": {"actor_gen": D2, "rew_inf": ONE, "ref_inf": OTHER, "actor_train": D2},
        "train on one": {"actor_gen": D2, "rew_inf": OTHER, "ref_inf": OTHER, "actor_train": ONE},
        "gen on one": {"actor_gen": ONE, "rew_inf": D2, "ref_inf": D2, "actor_train": D2},
    },
    "ppo": {
        "d2": dict.fromkeys(("actor_gen", "rew_inf", "ref_inf", "critic_inf", "actor_train", "critic_train"), D2),
        "train apart": {
            "actor_gen": D2, "rew_inf": D2, "ref_inf": D2, "critic_inf": OTHER,
            "actor_train": ONE, "critic_train": OTHER,
        },
        "all apart": {
            "actor_gen": D2, "rew_inf": ONE, "ref_inf": ONE, "critic_inf": OTHER,
            "actor_train": ONE, "critic_train": OTHER,
        },
        "train t2": {
            "actor_gen": D2, "rew_inf": D2, "ref_inf": D2, "critic_inf": D2, "actor_train": T2, "critic_train": T2,
        },
        "judges p2": {
            "actor_gen": D2, "rew_inf": P2, "ref_inf": P2, "critic_inf": P2, "actor_train": D2, "critic_train": D2,
        },
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The model, where things are written, and the description of the two devices."""

    model: Path
    out: Path

    @property
    def cluster(self) -> Path:
        return self.out / "cluster.json"

    def profile(self) -> None:
        """Measures the two devices."""
        sizes = {"batch_sizes": "[8,16]", "seq_lens": f"[{PROMPT_TOKENS + ANSWER_TOKENS},256]"}
        run(
            [
                "profile",
                f"models=[{self.model}]",
                "n_gpus_per_node=2",
                "model_parallel_sizes=[1,2]",
                f"output={self.cluster}",
                *_words(sizes),
            ]
        )

    def measure(self, experiment: str, name: str, calls: Mapping[str, Mapping[str, object]] | None) -> "Measured":
        """Returns what a plan's steps took, and were predicted to; the search's plan where `calls` is None."""
        trial = name.replace(" ", "-").replace(",", "")
        options: dict[str, object] = {
            "experiment_name": f"planner-{experiment}",
            "trial_name": trial,
            "fileroot": self.out,
            "mode": "local",
            "n_gpus_per_node": 2,
            "allocation_mode": "search" if calls is None else "manual",
            "planner.cluster": self.cluster,
            "benchmark_steps": NUM_STEPS,
            "total_train_epochs": NUM_STEPS,
            **self.describe(experiment),
        }
        options |= {f"{call}.{option}": value for call, own in (calls or {}).items() for option, value in own.items()}
        run([experiment, *_words(options)])
        logs = self.out / "logs" / getpass.getuser() / f"planner-{experiment}" / trial
        steps = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
        steps = [step for step in steps if "predicted/seconds" in step]
        return Measured(
            experiment=experiment,
            name=name,
            predicted=steps[-1]["predicted/seconds"],
            # The first steps compile; of shapes that vary, later ones may, which the median passes over.
            measured=statistics.median(step["seconds"] for step in steps[NUM_STEPS // 3 :]),
        )

    def describe(self, experiment: str) -> dict[str, object]:
        """Returns the options of an experiment's models and data."""
        if experiment == "sft":
            rows = [{"prompt": "word " * PROMPT_TOKENS, "answer": "word " * ANSWER_TOKENS}]
            data, models = {"dataset.train_path": self.write("sft", rows), "dataset.max_seqlen": 256}, ["model"]
        elif experiment == "dpo":
            pair = {"pos_answers": ["word " * ANSWER_TOKENS], "neg_answers": ["word " * (ANSWER_TOKENS // 2)]}
            rows = [{"prompt": "word " * PROMPT_TOKENS, **pair}]
            data, models = {"dataset.train_path": self.write("dpo", rows), "dataset.max_seqlen": 256}, ["actor", "ref"]
        else:
            rows, gen = [{"prompt": "word " * PROMPT_TOKENS}], "ppo.gen"
            data = {"dataset.path": self.write("prompts", rows), "dataset.max_prompt_len": PROMPT_TOKENS}
            data |= {f"{gen}.max_new_tokens": ANSWER_TOKENS, f"{gen}.min_new_tokens": ANSWER_TOKENS, "ppo.kl_ctl": 0.1}
            data |= {"critic.type.is_critic": True} if experiment == "ppo" else {}
            models = ["actor", "ref", "rew", *(["critic"] if experiment == "ppo" else [])]
        paths = {f"{model}.path": self.model for model in models}
        return {
            **data,
            **paths,
            **{f"{model}.init_from_scratch": True for model in models},
            "dataset.train_bs_n_seqs": NUM_PROMPTS,
        }

    def write(self, name: str, rows: Sequence[Mapping[str, object]]) -> Path:
        """Writes the rows as often as a batch has them."""
        path = self.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i in range(NUM_PROMPTS) for row in rows))
        return path


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of a step in one plan."""

    experiment: str
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def run(words: Sequence[str]) -> None:
    """Runs a command in two processes, each on a core of its own. RuntimeError with the output where one fails."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {COORDINATOR: address, NUM_PROCESSES: "2", PROCESSES_PER_NODE: "2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            ["taskset", "--cpu-list", str(core), sys.executable, "-m", "realjax.apps.quickstart", *words],
            env=os.environ | common | {PROCESS_ID: str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, core in enumerate(cores)
    ]
    output = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{' '.join(words)}\n{output[0][-3000:]}\n{output[1][-3000:]}")


def main() -> None:
    """Prints a line for each plan as it is measured, then the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experiments", default=",".join(PLANS))
    parser.add_argument("--profile", action="store_true", help="measure the two devices first")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench, found = Bench(model=args.model, out=args.out), list[Measured]()
    if args.profile:
        bench.profile()
    for experiment in args.experiments.split(","):
        for name, calls in {**PLANS[experiment], "search": None}.items():
            found.append(one := bench.measure(experiment, name, calls))
            print(f"{experiment:5} {name:22} {one.predicted:8.3f} {one.measured:8.3f} {one.error:+7.1%}", flush=True)
        own = {one.name: one.measured for one in found if one.experiment == experiment}
        print(f"{experiment:5} search / best of all: {own['search'] / min(own.values()):.2f}", flush=True)
    errors = [abs(one.error) for one in found]
    print(f"{len(found)} plans: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")


def _words(options: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]


if __name__ == "__main__":
    main()
