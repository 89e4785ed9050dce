"""Holds predictions against runs: two processes with a core each are a real cluster of two devices.

    python -m tools.bench.planner --out DIR [--models DIR [DIR ...]] [--experiments sft,dpo,grpo,ppo] [--most N]
        [--profile] [--again]

With --profile it first measures the two devices into `cluster.json` of the output directory. Each plan is then a run of
ten steps; predicted seconds of a step are printed beside the median and the least of those measured, and for each
experiment where the plans that the search and the rule pick stand among all. On a virtual machine whose cores are moved
between real ones the least says more: of equal steps some take half as long again. Beside that stands what is predicted
by the factors that the run of the first plan of its model and experiment left, as `planner.update_cluster` keeps them.
With --again nothing is run: steps that were measured before are predicted anew, by the cost model of now. A model's
directory needs its config.json and a tokenizer; without any, two small Llamas are written. The cores must be quiet;
programs come from a cache in the output directory, so that a second time takes little more than the steps.
"""

import argparse
import getpass
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from realjax.allocation.choice import PLAN_FILE, load_choices
from realjax.allocation.cluster import Cluster, find_cluster
from realjax.allocation.predict import predict
from realjax.allocation.run_workload import read_workload
from realjax.apps.plan import build_spec
from realjax.apps.quickstart import read_command
from realjax.dataflow.run import METRICS_FILE
from realjax.launch.environment import COORDINATOR, NUM_PROCESSES, PROCESS_ID, PROCESSES_PER_NODE
from tools.bench.plans import PLANS, Calls, write_models

NUM_STEPS, NUM_FIRST = 10, 2  # the first steps compile
PROMPT_TOKENS, ANSWER_TOKENS, ROW_TOKENS = 32, 32, 128
SEARCH, RULE = "search", "heuristic"
MEASURED = ("median", "least")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The models, where things are written, and the description of the two devices."""

    models: Sequence[Path]
    out: Path
    num_prompts: int = 16  # of a step, or sequences

    @property
    def cluster(self) -> Path:
        return self.out / "cluster.json"

    def profile(self) -> None:
        """Measures the two devices."""
        options = {
            "models": f"[{','.join(map(str, self.models))}]",
            "n_gpus_per_node": 2,
            "model_parallel_sizes": "[1,2]",
            "batch_sizes": f"[2,{self.num_prompts}]",
            "seq_lens": f"[{PROMPT_TOKENS + ANSWER_TOKENS},{ROW_TOKENS}]",
            "output": self.cluster,
            "fileroot": self.out,
        }
        run(["profile", *_words(options)])

    def list_cases(self, experiments: Sequence[str], most: int | None = None) -> Iterator["Case"]:
        """Yields the plans of the experiments, the first `most` of each or all, for each model, and those that are
        found for them.
        """
        for experiment in experiments:
            found = {SEARCH: SEARCH, RULE: RULE} if experiment in ("grpo", "ppo") else {SEARCH: SEARCH}
            for model in self.models:
                for name, plan in {**dict(islice(PLANS[experiment].items(), most)), **found}.items():
                    yield Case(bench=self, model=model, experiment=experiment, name=name, plan=plan)

    def write(self, name: str, row: dict[str, object]) -> Path:
        """Writes the row as often as a batch has it."""
        path = self.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i in range(self.num_prompts)))
        return path

    def describe(self, model: Path, experiment: str) -> dict[str, object]:
        """Returns the options of an experiment's models and data."""
        # A byte-level tokenizer makes several tokens of a word; what is too long is cut.
        prompt, answer = "word " * (PROMPT_TOKENS // 4), "word " * ANSWER_TOKENS
        if experiment == "sft":
            data: dict[str, object] = {
                "dataset.train_path": self.write("sft", {"prompt": prompt, "answer": answer}),
                "dataset.max_seqlen": ROW_TOKENS,
            }
            roles = ["model"]
        elif experiment == "dpo":
            pair = {"prompt": prompt, "pos_answers": [answer], "neg_answers": [answer[: len(answer) // 2]]}
            data = {"dataset.train_path": self.write("dpo", pair), "dataset.max_seqlen": ROW_TOKENS}
            roles = ["actor", "ref"]
        else:
            data = {"dataset.path": self.write("prompts", {"prompt": answer}), "dataset.max_prompt_len": PROMPT_TOKENS}
            for bound in ("max", "min"):
                data[f"ppo.gen.{bound}_new_tokens"] = ANSWER_TOKENS
            data["ppo.kl_ctl"] = 0.1
            roles = ["actor", "ref", "rew"]
            if experiment == "ppo":
                data["critic.type.is_critic"] = True
                roles.append("critic")
        data |= {f"{role}.path": model for role in roles} | {f"{role}.init_from_scratch": True for role in roles}
        return {**data, "dataset.train_bs_n_seqs": self.num_prompts}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan of an experiment on a model: options by call, or the mode that finds it."""

    bench: Bench
    model: Path
    experiment: str
    name: str
    plan: Calls | str

    @property
    def words(self) -> list[str]:
        """The command of the run."""
        calls = {} if isinstance(self.plan, str) else self.plan
        options: dict[str, object] = {
            "experiment_name": f"planner-{self.model.name}-{self.experiment}",
            "trial_name": self.name.replace(" ", "-").replace(",", ""),
            "fileroot": self.bench.out,
            "mode": "local",
            "n_gpus_per_node": 2,
            "allocation_mode": self.plan if isinstance(self.plan, str) else "manual",
            "planner.cluster": self.bench.cluster,
            "benchmark_steps": NUM_STEPS,
            "total_train_epochs": NUM_STEPS,
            **self.bench.describe(self.model, self.experiment),
        }
        options |= {f"{call}.{option}": value for call, own in calls.items() for option, value in own.items()}
        return [self.experiment, *_words(options)]

    @property
    def logs(self) -> Path:
        experiment, trial = (word.split("=")[1] for word in self.words[1:3])
        return self.bench.out / "logs" / getpass.getuser() / experiment / trial

    @property
    def record(self) -> Path:
        return self.logs / METRICS_FILE

    def read(self, refined: Cluster | None = None) -> "Row":
        """Returns what the steps took, and are predicted to with the run's plan and the cost model of now, by the
        profile and by a cluster that another run has refined.
        """
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        steps = [line for line in lines if line["kind"] == "train"]
        command = read_command(self.words)
        assert command, "no help was asked for"
        workload = read_workload(build_spec(*command), "cpu")
        choices = load_choices((self.logs / PLAN_FILE).read_text())
        later = steps[NUM_FIRST:]  # of shapes that vary, these may compile too, which both pass over
        seconds = [step["seconds"] for step in later]
        profile = str(self.bench.cluster)
        predicted = predict(workload, choices, find_cluster(profile), source=profile)
        measured = {
            name: statistics.median(values)
            for name in predicted.metrics()
            if (values := [step[name] for step in later if name in step])
        }
        again = None if refined is None else predict(workload, choices, refined, source=refined.source)
        return Row(
            case=self,
            predicted=predicted.step_seconds,
            refined=None if again is None else again.step_seconds,
            cluster=predicted.refined_cluster(measured),
            median=statistics.median(seconds),
            least=min(seconds),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of a step in one plan: predicted, and the median and the least of those measured."""

    case: Case
    predicted: float
    refined: float | None  # predicted by the factors of another run
    cluster: Cluster  # with the factors of this one
    median: float
    least: float

    def error(self, of: str, by: str = "predicted") -> float:
        """Returns how much too high a prediction is, of the `median` or of the `least`."""
        return getattr(self, by) / getattr(self, of) - 1

    def __str__(self) -> str:
        case, measured = self.case, [f"{getattr(self, of):8.3f} {self.error(of):+7.1%}" for of in MEASURED]
        words = [f"{case.model.name:10} {case.experiment:5} {case.name:22} {self.predicted:8.3f}", *measured]
        if self.refined is not None:
            words += ["refined", f"{self.refined:8.3f}", *(f"{self.error(of, 'refined'):+7.1%}" for of in MEASURED)]
        return " ".join(words)


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


def describe_picked(rows: Sequence[Row]) -> Iterator[str]:
    """Yields for each model and experiment how much longer the picked plans took than the fastest."""
    for key in dict.fromkeys((row.case.model.name, row.case.experiment) for row in rows):
        group = [row for row in rows if (row.case.model.name, row.case.experiment) == key]
        for of in MEASURED:
            own = {row.case.name: getattr(row, of) for row in group}
            picked = ", ".join(f"{name} {own[name] / min(own.values()):.2f}" for name in (SEARCH, RULE) if name in own)
            yield f"{' '.join(key)}: times the fastest plan, by the {of}: {picked}"


def describe_errors(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the errors of all plans: by the profile, and of those for which another run refined it."""
    for by in ("predicted", "refined"):
        known = [row for row in rows if getattr(row, by) is not None]
        for of in MEASURED if known else ():
            errors = [abs(row.error(of, by)) for row in known]
            median, worst = statistics.median(errors), max(errors)
            yield f"{len(known)} plans, {by}, by the {of}: median error {median:.1%}, worst {worst:.1%}"


def main() -> None:
    """Prints a line for each plan as it is measured, then the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experiments", default=",".join(PLANS))
    parser.add_argument("--most", type=int, help="plans of each experiment, beside those that are found; else all")
    parser.add_argument("--profile", action="store_true", help="measure the two devices first")
    parser.add_argument("--again", action="store_true", help="run nothing: predict what was measured before")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench, rows = Bench(models=args.models or write_models(args.out), out=args.out), list[Row]()
    refined: dict[tuple[str, str], Cluster] = {}  # of a model and an experiment, by its first plan
    if args.profile:
        bench.profile()
    for case in bench.list_cases(args.experiments.split(","), args.most):
        if not args.again:
            run(case.words)
        elif not case.record.exists():
            continue
        key = case.model.name, case.experiment
        rows.append(row := case.read(refined.get(key)))
        refined.setdefault(key, row.cluster)
        print(row, flush=True)
    print(*describe_picked(rows), *describe_errors(rows), sep="\n")


def _words(options: dict[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]


if __name__ == "__main__":
    main()
