"""The demo: makes a small data set and a tiny model and trains it, `python -m realjax.apps.demo [--out demo_run]`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from realjax.apps.demo_data import DemoFiles, write_demo_files
from realjax.apps.quickstart import find_experiment, report_errors, run_experiment
from realjax.options.checks import resolve_names
from realjax.options.common import CommonExperimentConfig
from realjax.options.parsing import parse_overrides
from realjax.options.paths import RunPaths, run_paths
from realjax.runtime.metrics import METRICS_FILE, read_metrics

NUM_DEVICES = 2  # virtual ones; more of them share the cores and gain nothing on a small machine


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run of the demo: an experiment, and the `key=value` options that make it small."""

    experiment: str
    options: Callable[[DemoFiles], tuple[str, ...]]


def sft_options(files: DemoFiles) -> tuple[str, ...]:
    """Returns the options of supervised fine-tuning from random weights."""
    return (
        f"model.path={files.model}",
        "model.init_from_scratch=True",
        "model.gradient_checkpointing=False",
        "model.optimizer.lr=0.002",
        "model.optimizer.warmup_steps_proportion=0.1",
        f"allocation.parallel.data_parallel_size={NUM_DEVICES}",
        f"dataset.train_path={files.data / 'sft-train.jsonl'}",
        f"dataset.valid_path={files.data / 'sft-valid.jsonl'}",
        "dataset.max_seqlen=128",
        "dataset.train_bs_n_seqs=64",
        "dataset.valid_bs_n_seqs=256",
        "total_train_epochs=2",
        "eval_freq_epochs=1",
    )


STAGES = (Stage(experiment="sft", options=sft_options),)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m realjax.apps.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_run"), help="directory for everything that it writes")
    args = parser.parse_args(argv)
    return report_errors(lambda: run_demo(args.out.absolute()))


def run_demo(out: Path, stages: Sequence[Stage] = STAGES, *, num_train: int = 4096, num_valid: int = 256) -> int:
    """Runs the stages one after the other beneath `out`; returns the first exit code that is not 0, else 0."""
    settings: Any = jax.config
    if not settings.jax_platforms:
        # It should run alike everywhere; JAX_PLATFORMS=cuda asks for a machine's GPUs.
        jax.config.update("jax_platforms", "cpu")
    files = write_demo_files(out, num_train=num_train, num_valid=num_valid)
    print(f"demo: {num_train:,} reviews, a tokenizer and a model's config are in {out}", flush=True)
    for number, stage in enumerate(stages, start=1):
        config = stage_config(stage, files, out)
        print(
            f"\ndemo: stage {number} of {len(stages)}, the same as\n  {stage_command(stage, files, out)}\n", flush=True
        )
        if code := run_experiment(stage.experiment, config):
            return code
        print(f"\ndemo: {describe_result(run_paths(config))}", flush=True)
    return 0


def stage_overrides(stage: Stage, files: DemoFiles, out: Path) -> tuple[str, ...]:
    """Returns the stage's whole command line, after the name of the experiment."""
    return (
        "experiment_name=demo",
        f"trial_name={stage.experiment}",
        f"fileroot={out}",
        "mode=local",
        "allocation_mode=manual",
        f"n_gpus_per_node={NUM_DEVICES}",
        *stage.options(files),
    )


def stage_config(stage: Stage, files: DemoFiles, out: Path) -> CommonExperimentConfig:
    """Returns the stage's options, read as the command line's are."""
    cls = find_experiment(stage.experiment).config_cls
    return resolve_names(parse_overrides(cls, stage_overrides(stage, files, out)), stage.experiment)


def stage_command(stage: Stage, files: DemoFiles, out: Path) -> str:
    """Returns the command that runs the stage by itself, for the shell."""
    return " \\\n    ".join((f"realjax {stage.experiment}", *stage_overrides(stage, files, out)))


def describe_result(paths: RunPaths) -> str:
    """Returns what a finished stage achieved on held-out data, and where its report is."""
    records = [r for r in read_metrics(paths.logs / METRICS_FILE) if r["kind"] == "eval"]
    first, last = records[0], records[-1]
    return (
        f"perplexity of unseen reviews: {first['ppl']:.1f} before, {last['ppl']:.2f} after {last['step']} steps\n"
        f"demo: checkpoints are in {paths.checkpoints}\n"
        f"demo: open the report: {paths.logs / 'report.html'}"
    )


if __name__ == "__main__":
    sys.exit(main())
