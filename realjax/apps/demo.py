"""The demo: SFT, a reward model and PPO of a tiny model on made-up data, `python -m realjax.apps.demo [--out DIR]`.

Each stage is a run of its own, with its own directory and report; a page beneath `--out` gathers the three.
"""

if __name__ == "__main__":
    from realjax.apps.start import begin

    begin()

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from realjax.apps.demo_data import DemoFiles, write_demo_files
from realjax.apps.demo_page import Finding, StageResult, write_page
from realjax.apps.errors import report_errors
from realjax.apps.quickstart import find_experiment, run_experiment
from realjax.dataflow.run import METRICS_FILE
from realjax.options.checks import resolve_names
from realjax.options.common import CommonExperimentConfig
from realjax.options.parsing import parse_overrides
from realjax.options.paths import run_paths
from realjax.record.metrics import read_metrics
from realjax.record.report import REPORT_FILE

NUM_DEVICES = 2  # virtual ones; more of them share the cores and gain nothing on a small machine

# By the name of the experiment that made it: the directory of its checkpoint.
Checkpoints = Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run of the demo: an experiment, and the `key=value` options that make it small."""

    experiment: str
    title: str
    options: Callable[[DemoFiles, Checkpoints], tuple[str, ...]]
    result: str  # the role whose checkpoint the next stages start from
    measures: Mapping[str, str]  # metrics by what they say


def sft_options(files: DemoFiles, checkpoints: Checkpoints) -> tuple[str, ...]:
    """Returns the options of supervised fine-tuning from random weights, on reviews of either sentiment."""
    return (
        "allocation_mode=manual",
        f"allocation.parallel.data_parallel_size={NUM_DEVICES}",
        f"model.path={files.model}",
        "model.init_from_scratch=True",
        "model.gradient_checkpointing=False",
        "model.optimizer.lr=0.005",
        "model.optimizer.warmup_steps_proportion=0.1",
        f"dataset.train_path={files.data / 'sft-train.jsonl'}",
        f"dataset.valid_path={files.data / 'sft-valid.jsonl'}",
        "dataset.max_seqlen=64",
        "dataset.train_bs_n_seqs=64",
        "total_train_epochs=2",
        "eval_freq_steps=16",
    )


def rw_options(files: DemoFiles, checkpoints: Checkpoints) -> tuple[str, ...]:
    """Returns the options of the reward model: the fine-tuned model with a new head, on praise before blame."""
    return (
        "allocation_mode=manual",
        f"allocation.parallel.data_parallel_size={NUM_DEVICES}",
        f"model.path={checkpoints['sft']}",
        "model.init_critic_from_actor=True",
        "model.gradient_checkpointing=False",
        "model.optimizer.lr=0.0002",
        "model.optimizer.warmup_steps_proportion=0.1",
        f"dataset.train_path={files.data / 'paired-train.jsonl'}",
        f"dataset.valid_path={files.data / 'paired-valid.jsonl'}",
        "dataset.max_seqlen=64",
        "dataset.max_pairs_per_prompt=1",
        "dataset.train_bs_n_seqs=128",
        "eval_freq_steps=2",
    )


def ppo_options(files: DemoFiles, checkpoints: Checkpoints) -> tuple[str, ...]:
    """Returns the options of PPO: actor and critic train side by side, each on a device of its own.

    `praise_reward` has no weight, so nothing learns from it: it says whether a higher score is a better review.
    """
    return (
        "allocation_mode=heuristic",
        f"actor.path={checkpoints['sft']}",
        f"ref.path={checkpoints['sft']}",
        f"critic.path={checkpoints['rw']}",
        f"rew.path={checkpoints['rw']}",
        "actor.gradient_checkpointing=False",
        "critic.gradient_checkpointing=False",
        "actor.optimizer.lr=0.0002",
        "critic.optimizer.lr=0.0005",
        "reward.fn=realjax.apps.demo_data:praise_reward",
        "reward.fn_weight=0",
        f"dataset.path={files.data / 'prompt-train.jsonl'}",
        f"dataset.valid_path={files.data / 'prompt-valid.jsonl'}",
        "dataset.max_prompt_len=16",
        "dataset.train_bs_n_seqs=128",
        "ppo.gen.max_new_tokens=32",
        "ppo.gen.top_p=1",
        "ppo.gen.top_k=1024",
        "ppo.kl_ctl=0.1",
        "eval.greedy=False",
        "eval_freq_steps=4",
    )


STAGES = (
    Stage(
        experiment="sft",
        title="Supervised fine-tuning: a model learns to write film reviews",
        options=sft_options,
        result="default",
        measures={"perplexity of unseen reviews": "ppl"},
    ),
    Stage(
        experiment="rw",
        title="Reward model: it learns that praise is better than blame",
        options=rw_options,
        result="default",
        measures={"share of unseen pairs whose better review scores higher": "acc"},
    ),
    Stage(
        experiment="ppo",
        title="PPO: the model writes what the reward model likes",
        options=ppo_options,
        result="actor",
        measures={
            "reward of reviews written on unseen prompts": "sampled/task_reward",
            "share of these that praise and do not blame, by their words": "sampled/reward/fn",
            "tokens of such a review": "sampled/avg_response_len",
            "KL to the model before PPO, per token of the reviews that it learns from": "kl",
        },
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m realjax.apps.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_run"), help="directory for everything that it writes")
    args = parser.parse_args(argv)
    with report_errors() as end:
        end.code = run_demo(args.out.absolute())
    return end.code


def run_demo(out: Path, stages: Sequence[Stage] = STAGES, *, num_train: int = 4096, num_valid: int = 128) -> int:
    """Runs the stages one after the other beneath `out`; returns the first exit code that is not 0, else 0."""
    settings: Any = jax.config
    if not settings.jax_platforms:
        # It should run alike everywhere; JAX_PLATFORMS=cuda asks for a machine's GPUs.
        jax.config.update("jax_platforms", "cpu")
    files = write_demo_files(out, num_train=num_train, num_valid=num_valid)
    print(f"demo: {num_train:,} reviews, a tokenizer and a model's config are in {out}", flush=True)
    checkpoints: dict[str, Path] = {}
    results = []
    for number, stage in enumerate(stages, start=1):
        command = stage_command(stage, files, checkpoints, out)
        print(f"\ndemo: stage {number} of {len(stages)}, the same as\n  {command}\n", flush=True)
        config = stage_config(stage, files, checkpoints, out)
        if code := run_experiment(stage.experiment, config):
            return code
        paths = run_paths(config)
        # Nothing is saved on the way, so there is one.
        (checkpoints[stage.experiment],) = (paths.checkpoints / stage.result).iterdir()
        result = read_result(stage, paths.logs)
        results.append(result)
        print("\n" + "\n".join(f"demo: {finding.text()}" for finding in result.findings), flush=True)
    page = write_page(out / REPORT_FILE, results)
    print(f"demo: checkpoints are in {out / 'checkpoints'}\ndemo: open the report: {page}", flush=True)
    return 0


def stage_overrides(stage: Stage, files: DemoFiles, checkpoints: Checkpoints, out: Path) -> tuple[str, ...]:
    """Returns the stage's whole command line, after the name of the experiment."""
    return (
        "experiment_name=demo",
        f"trial_name={stage.experiment}",
        f"fileroot={out}",
        "mode=local",
        f"n_gpus_per_node={NUM_DEVICES}",
        *stage.options(files, checkpoints),
    )


def stage_config(stage: Stage, files: DemoFiles, checkpoints: Checkpoints, out: Path) -> CommonExperimentConfig:
    """Returns the stage's options, read as the command line's are."""
    cls = find_experiment(stage.experiment).config_cls
    return resolve_names(parse_overrides(cls, stage_overrides(stage, files, checkpoints, out)), stage.experiment)


def stage_command(stage: Stage, files: DemoFiles, checkpoints: Checkpoints, out: Path) -> str:
    """Returns the command that runs the stage by itself, for the shell."""
    return " \\\n    ".join((f"realjax {stage.experiment}", *stage_overrides(stage, files, checkpoints, out)))


def read_result(stage: Stage, logs: Path) -> StageResult:
    """Returns what a finished stage achieved, on held-out data where it was measured there."""
    records = read_metrics(logs / METRICS_FILE)
    findings = []
    for subject, name in stage.measures.items():
        measured = [record for record in records if name in record]
        chosen = [record for record in measured if record["kind"] == "eval"] or measured
        before, after = chosen[0][name], chosen[-1][name]
        findings.append(Finding(subject=subject, before=before, after=after, num_steps=chosen[-1]["step"]))
    return StageResult(name=stage.experiment, title=stage.title, findings=tuple(findings), report=logs / REPORT_FILE)


if __name__ == "__main__":
    sys.exit(main())
